import numpy as np
import pytest

from dp_flash_attention.data.pen_strokes import STROKES, curve_matrix


@pytest.mark.parametrize("digit", range(10))
def test_a_curve_moves_turns_and_scales_with_its_points(digit: int) -> None:
    for strokes in STROKES[digit]:
        matrix = curve_matrix(strokes, 48)
        assert matrix.shape == (48, sum(map(len, strokes)))
        np.testing.assert_allclose(matrix.sum(axis=1), 1.0)


def test_a_stroke_starts_and_ends_at_its_own_points() -> None:
    strokes = (((0.0, 0.0), (1.0, 0.0)), ((1.0, 0.0), (1.0, 1.0), (0.0, 1.0)))
    path = curve_matrix(strokes, 30) @ np.array([point for stroke in strokes for point in stroke])
    np.testing.assert_allclose(path[[0, 9, 10, 29]], [[0, 0], [1, 0], [1, 0], [0, 1]], atol=1e-12)


def test_every_digit_has_styles_inside_the_paper() -> None:
    assert sorted(STROKES) == list(range(10))
    for styles in STROKES.values():
        assert len(styles) >= 3
        points = np.array([point for strokes in styles for stroke in strokes for point in stroke])
        assert points.min() > -0.1
        assert points.max() < 1.1
