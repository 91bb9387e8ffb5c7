"""Errors for users: suggestions, optional packages."""

import sys

import numpy as np
import pytest

from pi0_jax.errors import UserError, did_you_mean, listed, require_package


def test_user_error_is_a_value_error_with_exit_code_one():
    assert issubclass(UserError, ValueError)
    assert UserError("x").exit_code == 1


@pytest.mark.parametrize(
    ("name", "hint"), [("tabeltop", " Did you mean 'tabletop'?"), ("quadruped", ""), (None, ""), (12, "")]
)
def test_did_you_mean_suggests_the_nearest_name_or_nothing(name, hint):
    assert did_you_mean(name, ["libero", "tabletop"]) == hint


def test_did_you_mean_takes_any_iterable_and_a_cutoff():
    assert did_you_mean("wrist", iter(("wrist_image",)), cutoff=0.4) == " Did you mean 'wrist_image'?"
    assert did_you_mean("wrist", (), cutoff=0.0) == ""


def test_require_package_returns_an_installed_module():
    assert require_package("numpy.linalg", "extra") is np.linalg


def test_require_package_names_the_extra_of_an_absent_package():
    with pytest.raises(UserError, match=r"exporting needs no_such_package, which is not installed: .*\[export\]"):
        require_package("no_such_package.inner", "export", "exporting")


def test_require_package_says_why_an_installed_package_fails(tmp_path, monkeypatch):
    (tmp_path / "broken_package_of_a_test.py").write_text("import no_such_dependency")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(UserError, match=r"broken_package_of_a_test, which cannot be imported \(No module"):
        require_package("broken_package_of_a_test", "viz")


def test_a_long_list_is_cut_with_how_many_are_left():
    assert listed([]) == ""
    assert listed(["a", "b"], 2) == "a, b"
    assert listed(["a", "b", "c", "d"], 2) == "a, b and 2 more"
