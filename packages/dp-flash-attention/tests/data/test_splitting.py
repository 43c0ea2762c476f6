import torch

from dp_flash_attention.data.splitting import keyed_split

CONTENTS = [f"record {i}".encode() for i in range(2000)]


def test_removing_one_record_moves_no_other() -> None:
    whole = keyed_split(CONTENTS, seed=3, test_share=0.2)
    without = keyed_split(CONTENTS[:700] + CONTENTS[701:], seed=3, test_share=0.2)
    assert torch.equal(without, torch.cat([whole[:700], whole[701:]]))


def test_equal_records_stand_on_one_side() -> None:
    marks = keyed_split([*CONTENTS, *CONTENTS], seed=0, test_share=0.5)
    assert torch.equal(marks[:2000], marks[2000:])


def test_the_share_is_met_and_the_seed_decides() -> None:
    first, second = (keyed_split(CONTENTS, seed=seed, test_share=0.2) for seed in (0, 1))
    assert abs(float(first.float().mean()) - 0.2) < 0.03  # three standard deviations
    # Independent splits agree on 0.8^2 + 0.2^2 of the records.
    assert abs(float((first == second).float().mean()) - 0.68) < 0.04
