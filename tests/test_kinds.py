"""Nothing outside their own rooms asks which objective, sampler, path or head it has: a new one is one file."""

import ast
import typing
from pathlib import Path

import pi0_jax
from pi0_jax.config import Head, ObjectiveConfig
from pi0_jax.flow.coupling import Coupling
from pi0_jax.flow.path import Path as GaussianPath
from pi0_jax.flow.time import TimeDistribution
from pi0_jax.sampler import SAMPLERS

ROOT = Path(pi0_jax.__file__).parent
OWN_ROOMS = ("config/", "flow/", "model/head/", "objective/", "sampler/")
UNIONS = (ObjectiveConfig, Head, Coupling, GaussianPath, TimeDistribution)
KINDS = {kind.__name__ for union in UNIONS for kind in typing.get_args(union)} | {
    *SAMPLERS,
    "Solver",
    "RungeKutta",
    "Decoder",
}
MAY_ASK = {
    # Files of other projects hold some kinds and not others.
    "convert/assemble.py": {"Solver"},
    "convert/formats/lerobot.py": {"Solver"},
    "convert/parameters.py": {"Gaussian", "Straight", "Reflow", "Expert", "Joint"},
    # A comparison counts the evaluations of solvers, and trains a student after its teacher.
    "compare/cells.py": {"Solver", "Reflow"},
    "compare/config.py": {"Reflow"},
    # Reflow starts from a flow.
    "training/commands.py": {"Gaussian", "Reflow"},
}
"""File to the kinds that it asks for, and why."""


def names(node: ast.AST) -> set[str]:
    """Last parts of all names in an expression."""
    return {
        n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute)
    }


def asked(source: str) -> set[str]:
    """Kinds that a module's code asks for: isinstance, match, or a comparison of types."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and names(node.func) & {"isinstance", "issubclass"}:
            found |= set().union(*map(names, node.args[1:2]))
        elif isinstance(node, ast.MatchClass):
            found |= names(node.cls)
        elif isinstance(node, ast.Compare) and isinstance(node.left, ast.Call) and "type" in names(node.left.func):
            found |= set().union(*map(names, node.comparators))
    return found & KINDS


def test_only_the_allowed_modules_ask_for_a_kind():
    for file in sorted(ROOT.rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        if not name.startswith(OWN_ROOMS):
            assert asked(file.read_text()) <= MAY_ASK.get(name, set()), name


def test_questions_are_recognised():
    for source in (
        "isinstance(x, Gaussian)",
        "isinstance(x, config.Tokens | int)",
        "isinstance(x, (Euler, Heun))",
        "issubclass(kind, Solver)",
        "type(x) is Compact",
        "match x:\n    case Cosine(): pass",
    ):
        assert asked(source), source
    assert not asked("x = Gaussian() if y else isinstance(z, int)")
