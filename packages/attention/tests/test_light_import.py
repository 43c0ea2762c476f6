from __future__ import annotations

import subprocess
import sys


def test_importing_the_package_imports_no_torch() -> None:
    script = "import sys, dpfa_attention; assert 'torch' not in sys.modules, 'torch'; print(dpfa_attention.__version__)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "0.1.0"


def test_public_names_are_the_ones_listed() -> None:
    import dpfa_attention

    assert sorted(dpfa_attention.__all__) == [
        "DPCheckpointedAttention",
        "DPFlashAttention",
        "EnhancedDPFlashAttention",
        "LeakingPath",
        "PrivacyMechanismType",
        "PrivacySpent",
        "PrivacyStats",
        "PrivateMemory",
        "RandomizedLabels",
        "ReleasePaths",
        "ReleasedAttention",
        "ReleasedFeatures",
        "check_release_paths",
        "create_enhanced_dp_flash_attention",
        "create_research_mechanism",
        "dp_flash_attn_func",
        "dp_flash_attn_qkvpacked_func",
        "dp_flash_attn_varlen_func",
        "dp_flash_attn_with_kvcache",
        "dp_scaled_dot_product_attention",
        "process_ledger",
        "randomize_labels",
        "register_dp_attention",
        "release_attention",
        "release_features",
    ]
    assert all(callable(getattr(dpfa_attention, name)) for name in dpfa_attention.__all__)
