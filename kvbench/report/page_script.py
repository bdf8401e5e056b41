"""The page's script: one element without library or network, whose hash alone the page's policy allows to run."""

from __future__ import annotations

import base64
import hashlib

from kvbench.report.page_autopsy_script import AUTOPSY_SCRIPT
from kvbench.report.page_samples_script import SAMPLES_SCRIPT
from kvbench.report.page_script_tables import TABLES_SCRIPT

_THEME_SCRIPT = """
const root = document.documentElement, themes = document.getElementById("theme");
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches;
const nameTheme = () => { themes.textContent = isDark() ? "Light colours" : "Dark colours"; };
themes.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("kvbench-theme", root.dataset.theme); } catch { /* a page may have no storage */ }
  nameTheme();
});
systemDark.addEventListener("change", nameTheme);
try {
  const stored = localStorage.getItem("kvbench-theme");
  if (stored === "dark" || stored === "light") root.dataset.theme = stored;
} catch { /* a page may have no storage */ }
nameTheme();
themes.hidden = false;
"""
SCRIPT = f'"use strict";{_THEME_SCRIPT}{TABLES_SCRIPT}{AUTOPSY_SCRIPT}{SAMPLES_SCRIPT}'


def content_policy(*scripts: str) -> str:
    """Return the content security policy: nothing is loaded, only these scripts run, pictures are inside the page.

    Styles may be inline because figures carry style attributes.
    """
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
