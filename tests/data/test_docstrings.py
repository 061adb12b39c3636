import sys
from pathlib import Path

import pytest

from a1q.data import docstrings
from a1q.data.docstrings import dependency_closure, docstrings_of, source_files
from a1q.errors import StageError

SOURCE = '''
"""The module."""

class Outer:
    """The class.

    Dedented.
        Indented.
    """

    def method(self):
        """The method."""

try:
    import nothing
except ImportError:
    async def fallback():
        """The fallback."""

raise SystemExit("this file was executed")
'''


def test_names_kinds_and_texts(tmp_path: Path):
    path = tmp_path / "some.py"
    path.write_text(SOURCE)
    found = {item.name: (item.kind, item.text) for item in docstrings_of("pkg.some", path)}
    assert found == {
        "pkg.some": ("module", "The module."),
        "pkg.some.Outer": ("class", "The class.\n\nDedented.\n    Indented."),
        "pkg.some.Outer.method": ("function", "The method."),
        "pkg.some.fallback": ("function", "The fallback."),
    }


@pytest.mark.parametrize("content", [b"def (", b"\xff\xfe\x00", b'"""null \x00 byte"""', b"(" * 5000])
def test_a_file_that_cannot_be_parsed_is_passed_over(tmp_path: Path, content: bytes):
    path = tmp_path / "broken.py"
    path.write_bytes(content)
    assert list(docstrings_of("broken", path)) == []


def test_topics_are_read_without_importing_them(tmp_path: Path):
    path = tmp_path / "topics.py"
    path.write_text("topics = {'b': 'Second topic.', 'a': 'First topic.'}\n")
    found = list(docstrings_of(docstrings.TOPICS, path))
    assert [(item.kind, item.text) for item in found] == [("topic", "First topic."), ("topic", "Second topic.")]


def test_library_files_leave_tests_and_foreign_packages_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = "a.py pkg/__init__.py pkg/b.py test/c.py pkg/tests/d.py pkg/test_e.py site-packages/f.py x-y.py"
    for name in names.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert [module for module, _ in source_files(dependencies=False)] == ["a", "pkg", "pkg.b"]


def test_no_sources_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(StageError, match="has no source files"):
        list(source_files(dependencies=False))


def test_dependencies_are_found_through_each_other_and_not_imported():
    before = set(sys.modules)
    names = [item.name.lower() for item in dependency_closure("a1q")]
    assert {"torch", "sympy", "numpy", "pyyaml"} <= set(names)  # sympy comes with torch alone
    assert "a1q" not in names and "pytest" not in names
    assert not {"torch", "sympy"} & (set(sys.modules) - before)


def test_an_unknown_root_is_said():
    with pytest.raises(StageError, match="is not installed"):
        dependency_closure("no-such-distribution")
