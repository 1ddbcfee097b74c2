"""Mutation: do the tests notice a wrong program? Small errors are put into a copy of modules, one at a time.

    python tests/mutation.py --n 300 --seed 1

Mutants are drawn by the seed, from each module in proportion to its lines, operators taking turns. What is mutated:
comparisons, arithmetic, constants, boolean operators and conditions, slice bounds, returned values, statements (removed)
and arguments (swapped); what is not: docstrings, annotations, decorators, imports, texts.

A mutant lives in memory alone: the package is imported from a copy in a scratch folder, with the mutated module's source
swapped in. Libraries are imported and planted models made once; every mutant is tried in a fork of that process.
Asked are the tests that run the mutated line, fastest first, and all of the module's files for a line that runs at import.
Hypothesis draws the same examples each time and does not shrink.

The result (JSON) is written after every mutant, and a second run goes on where the first one ended: with other tests it
tries again what had survived.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "scores": ("test_scores", "test_detection"),
    "detection": ("test_detection", "test_sink_states", "test_official", "test_directions"),
    "edits": ("test_edits", "test_interventions"),
    "interventions": ("test_interventions",),
    "clean_runs": ("test_runs", "test_caches", "test_scores", "test_mass"),
    "edited_runs": ("test_runs", "test_losses", "test_scores", "test_mass"),
    "statistics": ("test_statistics", "test_intervals", "test_error_rates"),
}
"""Of each module the test files that must notice; slow tests are left out, as in `make test`."""
PRELOAD = (
    "coverage",
    "numpy",
    "pandas",
    "scipy.stats",
    "xarray",
    "torch",
    "transformers",
    "hypothesis",
    "pytest",
    "jaxtyping",
    "tqdm.auto",
    "transformer_lens.model_bridge",
)


# ------------------------------------------------------------------------------------------------------- mutants
@dataclass(frozen=True)
class Mutant:
    """One error: in `module`, lines `line`..`last_line`, `before` is replaced by `after`. `key` names it for good."""

    module: str
    line: int
    last_line: int
    operator: str
    before: str
    after: str
    start: int
    end: int

    @property
    def key(self) -> str:
        return f"{self.module}:{self.line}:{self.start}-{self.end}:{self.operator}:{self.after}"

    def source(self, original: str) -> str:
        raw = original.encode()
        return (raw[: self.start] + self.after.encode() + raw[self.end :]).decode()


COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.MatMult: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.RShift: ast.LShift, ast.LShift: ast.RShift,
}  # fmt: skip
SYMMETRIC = (
    "max",
    "min",
    "equal",
    "isinstance",
    "getattr",
    "hasattr",
    "promote_types",
    "transpose",
    "minimum",
    "maximum",
    "cosine_similarity",
)
"""Functions whose arguments are not swapped: it would change nothing, or break at once."""


def variants(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(operator, what stands in the node's place)."""

    def changed(**fields) -> ast.AST:
        twin = copy.copy(node)
        for name, value in fields.items():
            setattr(twin, name, value)
        return twin

    match node:
        case ast.Compare():
            for index, op in enumerate(node.ops):
                for other in COMPARISONS[type(op)]:
                    yield "comparison", changed(ops=[*node.ops[:index], other(), *node.ops[index + 1 :]])
        case ast.BinOp() if not _is_text(node.left):
            yield "arithmetic", changed(op=ARITHMETIC[type(node.op)]())
        case ast.AugAssign():
            yield "arithmetic", changed(op=ARITHMETIC[type(node.op)]())
            yield "removed statement", ast.Pass()
        case ast.UnaryOp():
            yield "boolean" if isinstance(node.op, ast.Not) else "arithmetic", node.operand
        case ast.Constant(value=bool()):
            yield "boolean", ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield from (("constant", ast.Constant(value)) for value in _other_numbers(node.value))
        case ast.BoolOp():
            yield "boolean", changed(op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        case ast.IfExp():
            yield "boolean", changed(body=node.orelse, orelse=node.body)
        case ast.Slice():
            for name in ("lower", "upper"):
                if (bound := getattr(node, name)) is not None:
                    yield "slice bound", changed(**{name: None})
                    if not isinstance(bound, ast.Constant):
                        yield "slice bound", changed(**{name: ast.BinOp(bound, ast.Add(), ast.Constant(1))})
        case ast.Return() if node.value is not None:
            yield "return", ast.Return(None)
        case ast.Call():
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            for i in range(len(node.args) - 1):
                pair = node.args[i : i + 2]
                plain = not any(isinstance(one, ast.Starred) or _is_text(one) for one in pair)
                if plain and name not in SYMMETRIC and ast.dump(pair[0]) != ast.dump(pair[1]):
                    yield "swapped argument", changed(args=[*node.args[:i], *pair[::-1], *node.args[i + 2 :]])
        case ast.Expr() | ast.Raise() | ast.Continue() | ast.Break() | ast.Assign():
            yield "removed statement", ast.Pass()


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _other_numbers(value: float) -> tuple[float, ...]:
    if isinstance(value, int):
        return (value + 1, value - 1) if value else (1,)
    return (value * 2, value / 2) if value > 1e-6 else (1.0,)  # what is tiny guards against 0, twice as much does too


def mutants_of(module: str, source: str) -> list[Mutant]:
    """All mutants of one module, in the order of its text."""
    tree = ast.parse(source)
    offsets = [0]
    for line in source.encode().splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    found: dict[str, Mutant] = {}

    def place(node) -> tuple[int, int]:
        return offsets[node.lineno - 1] + node.col_offset, offsets[node.end_lineno - 1] + node.end_col_offset

    def note(node, operator: str, after: str) -> None:
        start, end = place(node)
        before = source.encode()[start:end].decode()
        mutant = Mutant(module, node.lineno, node.end_lineno, operator, before, after, start, end)
        if after == before:
            return
        with contextlib.suppress(SyntaxError):  # a `pass` may not stand everywhere
            compile(mutant.source(source), module, "exec")
            found.setdefault(mutant.key, mutant)

    def visit(node: ast.AST, bound: set[str]) -> None:
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            arguments = node.args
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            bound = {*names, *(a.arg for a in (arguments.vararg, arguments.kwarg) if a)}
        if isinstance(node, ast.keyword) and node.arg in ("dim", "axis") and isinstance(node.value, ast.UnaryOp):
            node = node.value.operand  # -1 and 1 are the same axis of a matrix
        removable = not isinstance(node, ast.Assign) or _rebinds(node, bound)
        for operator, after in variants(node):
            if operator != "removed statement" or (removable and not _is_docstring(node)):
                text = ast.unparse(ast.fix_missing_locations(after))
                # What was one operand must stay one.
                note(
                    node,
                    operator,
                    f"({text})" if isinstance(after, ast.expr) and not isinstance(after, ast.Constant) else text,
                )
        if isinstance(node, ast.If | ast.While):
            note(node.test, "boolean", f"not ({ast.unparse(node.test)})")
        for child in _children(node):
            visit(child, bound)
        if isinstance(node, ast.Assign):
            bound |= {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}

    visit(tree, set())
    return list(found.values())


def _rebinds(node: ast.Assign, bound: set[str]) -> bool:
    """Whether the assignment changes something that is there: without a first binding nothing would run at all."""
    return all(
        not isinstance(target, ast.Name | ast.Tuple) or getattr(target, "id", None) in bound for target in node.targets
    )


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and _is_text(node.value)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """What of a node is mutated: no annotations, decorators, imports, texts."""
    skipped = {"annotation", "returns", "decorator_list", "bases", "type_comment"}
    for name, value in ast.iter_fields(node):
        if name in skipped:
            continue
        for child in value if isinstance(value, list) else [value]:
            typed = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            if (
                isinstance(child, ast.AST)
                and not typed
                and not isinstance(child, ast.JoinedStr | ast.Import | ast.ImportFrom)
            ):
                yield child


def drawn(sources: dict[str, str], n: int, seed: int) -> list[Mutant]:
    """`n` mutants, from each module in proportion to its lines, its operators taking turns.

    Without turns swapped arguments, a third of all there are, would be most of them. A smaller n draws the first of a larger one.
    """
    lines = {module: source.count("\n") for module, source in sources.items()}
    exact = {module: n * count / sum(lines.values()) for module, count in lines.items()}
    quota = {module: int(share) for module, share in exact.items()}
    for module in sorted(exact, key=lambda m: quota[m] - exact[m])[: n - sum(quota.values())]:
        quota[module] += 1
    chosen = []
    for module, source in sources.items():
        mutants, draw = mutants_of(module, source), random.Random(f"{seed}/{module}")
        draw.shuffle(mutants)
        turns = {
            mutant.key: sum(one.operator == mutant.operator for one in mutants[:i]) for i, mutant in enumerate(mutants)
        }
        chosen += sorted(mutants, key=lambda mutant: turns[mutant.key])[: quota[module]]
    return chosen


# --------------------------------------------------------------------------------------------------------- a fork
class Swapped(importlib.abc.MetaPathFinder):
    """Imports one module of the copied package from another source text."""

    def __init__(self, name: str, path: Path, source: str):
        self.name, self.path, self.text = name, path, source

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        text, file = self.text, str(self.path)

        class Loader(importlib.machinery.SourceFileLoader):
            def get_code(self, fullname):
                return compile(text, file, "exec")

        return importlib.util.spec_from_file_location(name, file, loader=Loader(name, file))


class Watch:
    """A pytest plugin: runs chosen tests in a chosen order, notes how long each took and which one failed first."""

    def __init__(self, order: list[str] | None = None, switch: Callable[[str], object] = lambda name: None):
        self.order, self.switch = order, switch
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    def pytest_configure(self, config):
        from hypothesis import Phase, settings

        settings.register_profile("mutation", settings(), phases=(Phase.explicit, Phase.generate), database=None)
        settings.load_profile("mutation")

    def pytest_collection_modifyitems(self, config, items):
        if self.order is not None:
            rank = {name: i for i, name in enumerate(self.order)}
            items[:] = sorted((item for item in items if item.nodeid in rank), key=lambda item: rank[item.nodeid])

    def pytest_runtest_logstart(self, nodeid):
        self.switch(nodeid)

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed.append(f"collecting {report.nodeid}")


def in_fork(work: Callable[[], dict], seconds: float) -> dict | None:
    """What `work` returns, run in a fork; None when it takes longer, {"died": ...} when it brings the process down."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(read)
        answer = {"died": "without a word"}
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            answer = work()
        except BaseException as error:
            answer = {"died": f"{type(error).__name__}: {error}"[:300]}
        finally:
            with os.fdopen(write, "w") as pipe:
                json.dump(answer, pipe)
            os._exit(0)
    os.close(write)
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(child, signal.SIGKILL))
    signal.alarm(max(1, int(seconds)))
    started = time.monotonic()
    try:
        with os.fdopen(read) as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
    finally:
        signal.alarm(0)
    if text:
        return json.loads(text)
    return None if time.monotonic() - started >= int(seconds) else {"died": "killed"}


@dataclass(frozen=True)
class Trial:
    """The copy of package and tests that mutants are tried in."""

    folder: Path

    def pytest(self, files: tuple[str, ...], watch: Watch, first_only: bool = True) -> Watch:
        import pytest

        os.chdir(self.folder)
        options = [
            "-q",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(self.folder),
            *["-x"] * first_only,
        ]
        pytest.main([*options, *(f"tests/{file}.py" for file in files)], plugins=[watch])
        return watch

    def baseline(self, modules: list[str]) -> dict:
        """Seconds of every test, and by module and line the tests that run it (of the unchanged program)."""
        import coverage

        files = tuple(dict.fromkeys(file for module in modules for file in TESTS[module]))
        package = self.folder / "sink_circuits"
        cover = coverage.Coverage(
            data_file=None, include=[str(package / f"{module}.py") for module in modules], config_file=False
        )
        cover.start()
        watch = self.pytest(files, Watch(switch=cover.switch_context), first_only=False)
        cover.stop()
        if watch.failed:
            return {"failed": watch.failed}
        data = cover.get_data()
        lines = {}
        for module in modules:
            contexts = data.contexts_by_lineno(str(package / f"{module}.py"))
            lines[module] = {str(line): sorted(filter(None, names)) for line, names in contexts.items()}
        return {"seconds": watch.seconds, "lines": lines}

    def tried(self, mutant: Mutant, source: str, order: list[str] | None) -> dict:
        name, path = f"sink_circuits.{mutant.module}", self.folder / "sink_circuits" / f"{mutant.module}.py"
        sys.meta_path.insert(0, Swapped(name, path, mutant.source(source)))
        return {"failed": self.pytest(TESTS[mutant.module], Watch(order)).failed}


def judged(trial: Trial, mutant: Mutant, source: str, base: dict) -> dict:
    """status: "killed" (by a test), "timeout" (counts as killed) or "survived"."""
    seconds, started = base["seconds"], time.monotonic()
    own = [
        name
        for name in seconds
        if name.split("::")[0].removeprefix("tests/").removesuffix(".py") in TESTS[mutant.module]
    ]
    own.sort(key=seconds.get)
    touching = {
        name
        for line in range(mutant.line, mutant.last_line + 1)
        for name in base["lines"][mutant.module].get(str(line), ())
    }
    first = [name for name in own if name in touching]
    order = first or own  # lines that run when the module is imported are every test's
    answer = in_fork(lambda: trial.tried(mutant, source, order), 30 + 10 * sum(seconds[name] for name in order))
    status = "timeout" if answer is None else "killed" if answer.get("died") or answer["failed"] else "survived"
    by = "" if answer is None else answer.get("died") or (answer["failed"] or [""])[0]
    return {
        **asdict(mutant),
        "status": status,
        "by": by,
        "n_tests": len(first),
        "seconds": round(time.monotonic() - started, 1),
    }


def warm(trial: Trial) -> None:
    """What tests share and no mutated module has a part in, made before the first fork: planted models, passes by hand."""
    sys.path[:0] = [str(trial.folder), str(trial.folder / "tests")]
    common, adapters = (importlib.import_module(name) for name in ("common", "sink_circuits.adapters"))
    for backend in common.BACKENDS:
        adapters.adapt(common.lens(backend))
    for edits in (None, {(6, common.SINK): 0.0, (7, common.SINK): 0.0}):
        common.by_hand(common.prompt(), edits)
    if early := {f"sink_circuits.{module}" for module in TESTS} & set(sys.modules):
        raise ImportError(f"{sorted(early)} are imported before they are mutated: they must not be.")


# ----------------------------------------------------------------------------------------------------------- main
def digest(paths) -> str:
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(paths))).hexdigest()[:16]


def table(results: list[dict]) -> str:
    """Counts by module and by operator, as Markdown."""
    out = []
    for what in ("module", "operator"):
        out += [
            f"| {what} | mutants | killed by a test | out of time | survived | killed |",
            "|---|---|---|---|---|---|",
        ]
        groups = list(dict.fromkeys(one[what] for one in results))
        for group in [*(groups if what == "module" else sorted(groups)), "all"]:
            own = [one for one in results if group in ("all", one[what])]
            n = {status: sum(one["status"] == status for one in own) for status in ("killed", "timeout", "survived")}
            share = (n["killed"] + n["timeout"]) / len(own)
            out.append(f"| {group} | {len(own)} | {n['killed']} | {n['timeout']} | {n['survived']} | {share:.0%} |")
        out.append("")
    return "\n".join(out)


def main() -> int:
    parser = argparse.ArgumentParser(description="Do the tests notice errors put into the program?")
    parser.add_argument("--n", type=int, default=300, help="mutants (default: 300)")
    parser.add_argument("--seed", type=int, default=1, help="draws them (default: 1)")
    parser.add_argument(
        "--modules", nargs="*", default=list(TESTS), choices=list(TESTS), help="only these of those drawn"
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path("build/mutation"),
        help="folder of the copy and the result (default: build/mutation)",
    )
    arguments = parser.parse_args()
    os.environ.update(CI="1", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    scratch = arguments.scratch.resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    trial = Trial(scratch / "copy")
    for part in ("sink_circuits", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.rmtree(trial.folder / part, ignore_errors=True)
        shutil.copytree(ROOT / part, trial.folder / part, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", trial.folder)
    sources = {module: (trial.folder / "sink_circuits" / f"{module}.py").read_text() for module in TESTS}

    for name in PRELOAD:
        importlib.import_module(name)
    warm(trial)
    tests = digest(path for path in (trial.folder / "tests").glob("*.py") if path.name != Path(__file__).name)
    program = digest((trial.folder / "sink_circuits").rglob("*.py"))
    cached = scratch / f"baseline-{'-'.join(arguments.modules)}-{tests}-{program}.json"
    if not cached.exists():
        base = in_fork(lambda: trial.baseline(arguments.modules), 3600)
        if not base or not base.get("seconds"):
            print(f"the tests fail on the unchanged program: {base}", file=sys.stderr)
            return 1
        cached.write_text(json.dumps(base))
    base = json.loads(cached.read_text())
    print(f"{len(base['seconds'])} tests, {sum(base['seconds'].values()):.0f} s", flush=True)

    kept = scratch / f"result-{arguments.seed}.json"
    before = json.loads(kept.read_text()) if kept.exists() else {}
    versions = {module: hashlib.sha256(source.encode()).hexdigest()[:16] for module, source in sources.items()}
    results = []
    for index, mutant in enumerate(drawn(sources, arguments.n, arguments.seed)):
        if mutant.module not in arguments.modules:
            continue
        name = f"{versions[mutant.module]}:{mutant.key}"
        known = before.get(name)
        if known is None or (known["status"] == "survived" and known["tests"] != tests):
            known = {**judged(trial, mutant, sources[mutant.module], base), "tests": tests}
            before[name] = known
            kept.with_suffix(".part").write_text(json.dumps(before, indent=1))
            kept.with_suffix(".part").replace(kept)
            print(
                f"{index + 1} {known['status']} {known['seconds']} s {mutant.module}:{mutant.line} {mutant.operator}",
                flush=True,
            )
        results.append(known)
    print(f"\n{table(results)}")
    for one in results:
        if one["status"] == "survived":
            print(
                f"survived: {one['module']}:{one['line']} {one['operator']}\n    {one['before']!r}\n    {one['after']!r}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
