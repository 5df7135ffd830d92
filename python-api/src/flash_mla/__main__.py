"""`python -m flash_mla` prints the configuration."""

from flash_mla.config import show_config

show_config()
