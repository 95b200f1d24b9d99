"""The demo page: `python -m videoxl.demo`, see `page`."""

from .page import main

__all__ = ["main"]
