"""The page's script: one element without library or network, whose hash alone the page's policy allows to run."""

from __future__ import annotations

import base64
import hashlib

from kvbench.report.page_script_samples import SAMPLES_SCRIPT
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
_LINKS_SCRIPT = """
document.addEventListener("click", event => {
  const link = event.target.closest && event.target.closest("a[data-sample]");
  if (!link) return;
  for (const [id, text] of [["pick-group", link.dataset.group], ["pick-cell", link.dataset.cell],
      ["pick-sample", link.dataset.sample]]) {
    const select = document.getElementById(id);
    const option = select && [...select.options].find(one => one.text === text);
    if (!option) continue;
    select.value = option.value;
    select.dispatchEvent(new Event("change"));
  }
});
"""
SCRIPT = f'"use strict";{_THEME_SCRIPT}{TABLES_SCRIPT}{SAMPLES_SCRIPT}{_LINKS_SCRIPT}'


def content_policy(*scripts: str) -> str:
    """Return the content security policy: nothing is loaded, only these scripts run, pictures are inside the page.

    Styles may be inline because figures carry style attributes.
    """
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
