"""The page at `/`: static files, and what its scripts ask of the server first.

GET /             site/index.html; no key
GET /static/...   the other files; no key
GET /page/config  the model, what it was trained for, sample texts, ICE servers; with the key

The page has no build step, loads nothing from another host and runs under a strict
Content-Security-Policy.
"""

from mimo_fast.server.page.config import page_config
from mimo_fast.server.page.files import SITE, page, static_files

__all__ = ["SITE", "page", "page_config", "static_files"]
