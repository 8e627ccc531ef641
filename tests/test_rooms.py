"""Which module may import which, and what a program answers before it imports what takes seconds."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ('layers', 'data', 'runs', 'charts')
# What each room may import, beside itself.
BELOW = {
    'configurator': set(),
    'layers': {'configurator'},
    'data': {'configurator'},
    'models': {'configurator', 'layers'},
    'runs': {'configurator', 'layers', 'data', 'models'},
    'programs': {'configurator', 'layers', 'data', 'models', 'runs'},
}


def modules() -> dict[str, ast.Module]:
    """Name -> syntax tree of every module of the project but its tests and config files."""
    paths = [*ROOT.glob('*.py'), *(path for folder in FOLDERS for path in (ROOT / folder).rglob('*.py'))]
    names = {'.'.join(path.relative_to(ROOT).with_suffix('').parts): path for path in paths}
    return {
        name.removesuffix('.__init__'): ast.parse(path.read_text(encoding='utf-8'))
        for name, path in names.items()
    }


MODULES = modules()


def imported(nodes) -> set[str]:
    """The project's modules that import statements among the nodes name."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f'{node.module}.{alias.name}' for alias in node.names} & MODULES.keys()
            found |= inside or {node.module}
    return found & MODULES.keys()


def outside_of_functions(tree):
    """The nodes that run when the module is imported (what only type checkers read does not)."""
    for node in ast.iter_child_nodes(tree):
        lazy = isinstance(node, (ast.FunctionDef, ast.Lambda))
        if not lazy and not (isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING'):
            yield node
            yield from outside_of_functions(node)


ANYWHERE = {name: imported(ast.walk(tree)) for name, tree in MODULES.items()}
AT_IMPORT = {name: imported(outside_of_functions(tree)) for name, tree in MODULES.items()}


def is_program(name: str) -> bool:
    guards = [ast.unparse(node.test) for node in MODULES[name].body if isinstance(node, ast.If)]
    return "__name__ == '__main__'" in guards


def room(name: str) -> str:
    """A folder is a room; configurator.py and declared.py, on which all the others build, are one too. Other
    files on top are models where they need nothing of runs/, else programs and what belongs to them."""
    top = name.split('.')[0]
    if top in ('configurator', 'declared'):
        return 'configurator'
    if top in ('layers', 'data', 'runs'):
        return top
    uses_runs = any(other.split('.')[0] == 'runs' for other in ANYWHERE[name])
    return 'programs' if uses_runs or is_program(name) or top == 'charts' else 'models'


@pytest.mark.parametrize('name', sorted(MODULES))
def test_imports_go_one_way(name):
    here = room(name)
    wrong = [other for other in ANYWHERE[name] if room(other) not in BELOW[here] | {here}]
    assert not wrong, f'{name} ({here}) imports {wrong}'


def test_no_program_imports_a_program():
    programs = {name for name in MODULES if is_program(name)}
    assert {'train', 'sample', 'eval', 'bench', 'hf', 'explain', 'compare', 'experiments'} <= programs
    pairs = {(name, other) for name in MODULES for other in ANYWHERE[name] & programs}
    assert pairs == set()


def test_no_module_imports_itself_on_a_way_round():
    order = list(TopologicalSorter(AT_IMPORT).static_order())  # raises CycleError
    assert set(order) == MODULES.keys()


@pytest.mark.parametrize('name', ['configurator', 'runs.knobs', 'runs.schedule', 'runs.datasets'])
def test_what_is_asked_before_torch_does_not_need_it(name):
    code = f'import sys, {name}; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=False).returncode == 0


# Runs a program in this process, as `python PROGRAM ARGUMENTS` would, and says on the last line whether torch
# was imported on the way.
PROBE = """
import runpy, sys
program, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = program
try:
    runpy.run_path(program, run_name='__main__')
finally:
    print(f'torch: {"torch" in sys.modules}')
"""


def answer(program, *arguments):
    command = [sys.executable, '-c', PROBE, program, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize('program', ['train.py', 'sample.py', 'eval.py', 'bench.py', 'compose.py'])
def test_help_and_typos_are_answered_before_torch_is_imported(program):
    status, out, err = answer(program, '--threds=3')
    assert status == 2 and out.endswith('torch: False\n'), out + err
    assert err.startswith(f'{program}: the command line sets') and err.count('\n') == 1
    status, out, err = answer(program, '--help')
    assert status == 0 and out.endswith('torch: False\n') and '--threads' in out
