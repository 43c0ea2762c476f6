"""Where records come from: the bundled digits, drawn digits, and the user's own files."""

from dp_flash_attention.data.sources import load_task
from dp_flash_attention.data.task import Records, Source, Task

__all__ = ["Records", "Source", "Task", "load_task"]
