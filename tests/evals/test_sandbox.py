"""Verdicts on programs: right ones pass, nearly right ones fail, and none is forged."""

import os
import threading

import pytest
from helpers import cases, needs_bubblewrap, verdict

from evals.sandbox import Program, decode, encode, run_programs

ADD = "def f(a, b):\n    return a + b\n"
WRONG = "def f(a, b):\n    return 5\n"
ADD_TEST = "assert f(2, 3) == 5\nassert f(2, 4) == 6"
FORGED = {
    "sys_exit": "import sys\nsys.exit(0)",
    "system_exit_in_the_call": "def f(a, b):\n    raise SystemExit(0)",
    "os_exit": "import os\ndef f(a, b):\n    os._exit(0)",
    "always_equal": "class Equal(int):\n    def __eq__(self, other): return True\n    __ne__ = None\ndef f(a, b): return Equal(0)",
    "stack_walk": (
        "import sys\ndef f(a, b):\n    frame = sys._getframe()\n    while frame:\n        for held in frame.f_locals.values():\n"
        "            if isinstance(held, list): held.append('passed')\n            if isinstance(held, dict): held['passed'] = True\n"
        "        frame = frame.f_back\n    return 5"
    ),
    "patched_assert": (
        "import builtins, unittest\nclass Quiet(BaseException): pass\nbuiltins.AssertionError = Quiet\n"
        "unittest.TestCase.assertEqual = lambda *given: None\n" + WRONG
    ),
    "atexit": "import atexit, os\natexit.register(lambda: (print('passed', flush=True), os._exit(0)))\n" + WRONG,
    "fake_token": (
        "import gc, os, re\ndef f(a, b):\n    found = re.findall('[0-9a-f]{32}', str(gc.get_objects())) or ['0' * 32]\n"
        "    for end in range(32):\n        for word in (*found, 'passed'):\n            try: os.write(end, word.encode())\n"
        "            except OSError: pass\n    return 5"
    ),
}
HONEST = {
    "plain": (ADD, ADD_TEST),
    "floats": ("def f(x): return [x / 3, float('nan'), float('inf')]", "a, b, c = f(1.0)\nassert a == 1 / 3 and b != b and c > 1e308"),
    "containers": (
        "def f(x): return {(1, 'a'): {2, 3}, None: [True, b'x', 2j, frozenset()]}",
        "assert f(0) == {(1, 'a'): {2, 3}, None: [True, b'x', 2j, frozenset()]}",
    ),
    "error": ("def f(x):\n    raise KeyError(x)", "try:\n    f('a')\nexcept KeyError as error:\n    assert error.args\nelse:\n    assert False"),
    "iterators": ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2] and f(3) != [0, 1, 2]"),
    "own_class": (
        "class Node:\n    def __init__(self, value): self.value, self.next = value, None\n"
        "def f(node): return node.value + (f(node.next) if node.next else 0)",
        "node = Node(1)\nnode.next = Node(value=2)\nassert f(node) == 3",
    ),
    "library": (
        "import collections, dataclasses, heapq, itertools, math, re, typing\n@dataclasses.dataclass\nclass Pair:\n    a: int\n"
        "def f(x: typing.List[int]): return collections.Counter(heapq.nsmallest(2, itertools.chain(x, [Pair(1).a])))",
        "assert f([3, 1, 2]) == {1: 2}",
    ),
    "big_number": ("import math\ndef f(n): return math.factorial(n)", "import math\nassert f(3000) == math.factorial(3000)"),
    "prints": ("def f(a, b):\n    print('passed', a, b)\n    return a + b", ADD_TEST),
    "thread": (
        "import concurrent.futures\ndef f(x):\n    with concurrent.futures.ThreadPoolExecutor(1) as pool:\n        return list(pool.map(abs, x))",
        "assert f([-1, 2]) == [1, 2]",
    ),
    "threads_in_turn": (
        "import threading\ndef f(x):\n    held = []\n    for n in x:\n        one = threading.Thread(target=held.append, args=(n,))\n"
        "        one.start()\n        one.join()\n    return held",
        "assert f([*range(50)]) == [*range(50)]",
    ),
    "event_loop": (
        "import asyncio\nasync def add(a, b):\n    await asyncio.sleep(0.01)\n    return a + b\ndef f(a, b): return asyncio.run(add(a, b))",
        ADD_TEST,
    ),
    "copies_of_files": (
        "import os, shutil, tempfile\ndef f(text):\n    with tempfile.TemporaryDirectory() as folder:\n        os.makedirs(f'{folder}/a/b')\n"
        "        with open(f'{folder}/a/b/c', 'w') as file: file.write(text)\n        shutil.copytree(f'{folder}/a', f'{folder}/d')\n"
        "        shutil.copy2(f'{folder}/d/b/c', f'{folder}/e')\n        os.rename(f'{folder}/e', f'{folder}/f')\n"
        "        return open(f'{folder}/f').read()",
        "assert f('text') == 'text'",
    ),
    "local_sockets": (
        "import select, socket\ndef f(text):\n    one, other = socket.socketpair()\n    one.sendall(text)\n    select.select([other], [], [], 1)\n"
        "    return other.recv(9)",
        "assert f(b'text') == b'text'",
    ),
    "alarm": (
        "import signal, time\ndef f():\n    def raised(number, frame): raise TimeoutError\n    signal.signal(signal.SIGALRM, raised)\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0.05)\n    try: time.sleep(5)\n    except TimeoutError: return 'late'",
        "assert f() == 'late'",
    ),
    "much_memory": ("def f(n): return len(bytearray(b'1') * n)", "assert f(400 * 2 ** 20) == 400 * 2 ** 20"),
    "memory_map": (
        "import mmap\ndef f():\n    with mmap.mmap(-1, 4096) as held:\n        held[:4] = b'text'\n        return held[:4]",
        "assert f() == b'text'",
    ),
    "builtin_name": ("def sum(a, b=1):\n    return a * b", "assert sum(2, b=3) == 6 and len(str(sum(2))) == 1", "sum"),
}
NEARLY = {
    "last_test": ("def f(a, b): return 5 if b == 3 else 7", ADD_TEST),
    "text_for_number": ("def f(a, b): return str(a + b)", ADD_TEST),
    "nothing": ("def f(a, b): a + b", ADD_TEST),
    "tuple_for_list": ("def f(x): return tuple(x)", "assert f([1]) == [1]"),
    "iterator_for_list": ("def f(x): return map(int, x)", "assert f(['1']) == [1]"),
    "float_error": ("def f(x): return x * 3", "assert f(0.1) == 0.3"),
    "other_name": ("def g(a, b): return a + b", ADD_TEST),
    "syntax": ("def f(a, b) return a + b", ADD_TEST),
    "raises": ("def f(a, b): return a + b if b < 4 else 1 / 0", ADD_TEST),
    "own_helper": ("def poly(x): return 0\ndef f(x): return 0.0", "assert poly(f(0)) == 0"),
}


@needs_bubblewrap
@cases(FORGED)
def test_forged_verdict(case: str) -> None:
    assert not verdict(case, ADD_TEST, seconds=5.0).passed


@needs_bubblewrap
@cases(HONEST)
def test_honest_program(case: tuple[str, ...]) -> None:
    assert verdict(*case) == (True, "passed")


@needs_bubblewrap
@cases(NEARLY)
def test_nearly_right_program(case: tuple[str, str]) -> None:
    assert verdict(*case, setup="def poly(x): return x + 1") == (False, "failed")


@needs_bubblewrap
def test_tests_that_catch_everything_do_not_hide_an_early_end() -> None:
    assert not verdict("import os\ndef f(): os._exit(0)", "try:\n    f()\nexcept BaseException:\n    pass").passed


@needs_bubblewrap
def test_an_end_of_iteration_does_not_skip_the_tests() -> None:
    solution = "def f(x):\n    raise StopIteration"
    assert not verdict(solution, "for answer, wanted in zip(map(f, [1, 2]), [1, 2]):\n    assert answer == wanted").passed


@needs_bubblewrap
def test_a_solution_holds_its_two_pipes_and_no_more() -> None:
    solution = "import os, stat\ndef f():\n    held = []\n    for end in range(32):\n        try: held.append(stat.S_IFMT(os.fstat(end).st_mode))\n"
    solution += "        except OSError: pass\n    return held == [stat.S_IFIFO] * 5"
    assert verdict(solution, "assert f()").passed


@needs_bubblewrap
@pytest.mark.parametrize("said", ["{}", "[]", '["value", ["set", ["list"]]]', '["value", ["code", "x"]]', '["value", ' + "[" * 10**5, "nonsense"])
def test_answers_that_are_no_data(said: str) -> None:
    solution = (
        f"import os\ndef f():\n    for end in range(3, 32):\n        try: os.write(end, {said!r}.encode() + b'\\n')\n        except OSError: pass"
    )
    assert verdict(solution) == (False, "forged")


@needs_bubblewrap
def test_an_answer_without_end() -> None:
    assert verdict("def f(): return ['x' * 10 ** 6] * 10") == (False, "too much output")
    assert verdict("import itertools\ndef f(): return itertools.count()", seconds=2.0, memory=2**27).reason in ("out of memory", "timed out")


@needs_bubblewrap
def test_programs_share_no_file_and_keep_their_order() -> None:
    leave = Program("def f():\n    open('/tmp/left', 'w').close()", "f()", "f")
    look = Program("import os\ndef f(): return os.listdir('/tmp')", "assert f() == []", "f")
    done: list[int] = []
    verdicts = run_programs([leave, look, Program(WRONG, ADD_TEST, "f"), look], progress=done.append)
    assert [verdict.passed for verdict in verdicts] == [True, True, False, True]
    assert done == [1] * 4
    assert run_programs([]) == []


@needs_bubblewrap
def test_nothing_is_left_open() -> None:
    verdict(ADD, ADD_TEST)
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    run_programs([Program(ADD, ADD_TEST, "f")] * 8)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


@pytest.mark.parametrize(
    "value", [None, True, -(10**50), 0.1, float("-inf"), 1j, "\ud800", b"\0", [(), {1}], {(1,): {"a": frozenset({2})}}, range(3)]
)
def test_data_survive(value: object) -> None:
    assert decode(encode(value, None), None) == value
    assert type(decode(encode(value, None), None)) is type(value)
