"""The command `vbus`: one module for each group of verbs, imported when one of them is typed.

Its manners: status 0 only on success, 1 failed, 2 wrong usage; errors in one line that says what to do next; `--json`
on every listing. Nothing here imports pydantic, uvicorn or starlette, which only the verbs that serve a bus need.
"""

from vbus.cli.app import main

__all__ = ["main"]
