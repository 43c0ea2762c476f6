"""``python -m dp_flash_attention``."""

from dp_flash_attention.cli import main

main()
