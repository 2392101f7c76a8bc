# ruff: noqa: E501
"""Problems in the formats of the public sets, and programs for each with the verdicts of the public graders.

The verdicts are LiveCodeBench's `testing_util.run_test`, HumanEval's `execution.check_correctness` (for MBPP too: its tests
in a check) and, for APPS, the rule of its `testing_util` stated by hand (it needs a package that is no longer built); they
were run once on these very programs. Where the verdict here is another one, it stands after it, with the reason.
"""

from __future__ import annotations

import json

LIVECODEBENCH = {
    "sum": {"tests": [["1 2\n", "3\n"], ["5 7\n", "12\n"]]},
    "half": {"tests": [["1\n", "0.500000\n"], ["3\n", "1.5\n"]]},
    "lines": {"tests": [["2\na b\nc\n", "a b\nc\n"]]},
    "list": {"function": "pair", "tests": [["[2, 7]\n9", "[0, 1]"], ["[3, 3]\n6", "[0, 1]"]]},
    "value": {"function": "mean", "tests": [["[1, 2]", "1.5"], ["[2, 2]", "2.0"]]},
    "deep": {"function": "depth", "tests": [["3000", "3000"]]},
}
S = "class Solution:\n    def "
LIVECODEBENCH_ANSWERS = [
    ("sum", "print(sum(map(int, input().split())))", 1), ("sum", "a, b = map(int, input().split())\nprint(a + b)\n\n", 1),
    ("sum", "print(3)", 0), ("sum", "print(sum(map(int, input().split())) + 0.0)", 1), ("sum", "print('answer', sum(map(int, input().split())))", 0),
    ("sum", "import sys\nprint(sum(map(int, sys.stdin.read().split())))", 1), ("sum", "print(sum(map(int, input().split())))\nexit()", 1),
    ("sum", "import sys\nprint(sum(map(int, input().split())))\nsys.exit(1)", 1), ("sum", "print(sum(map(int, input().split())))\n1 / 0", 0),
    ("sum", "def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()", 1), ("sum", "print(sum(map(int, input())))", 0),
    ("sum", "print('', sum(map(int, input().split())), '')", 1), ("sum", "for w in [sum(map(int, input().split()))]: print(w)", 1), ("sum", "x = ", 0),
    ("sum", "print(reduce(add, map(int, input().split())))", 1), ("sum", "a = [int(w) for w in stdin.readline().split()]\nprint(a[0] + a[1])", 1),
    ("half", "print(int(input()) / 2)", 1), ("half", "print('%.6f' % (int(input()) / 2))", 1), ("half", "print(int(input()) // 2)", 0), ("half", "print(int(input()) / 2 + 1e-9)", 0),
    ("half", "print(Fraction(int(input()), 2))", 0), ("half", "print(f'{int(input()) / 2:.1e}')", 1),
    ("lines", "n = int(input())\nfor _ in range(n): print(input())", 1), ("lines", "n = int(input())\nprint(*[input() for _ in range(n)])", 0),
    ("lines", "n = int(input())\nfor _ in range(n): print(input() + '  ')", 1), ("lines", "n = int(input())\nfor _ in range(n): print(input().replace(' ', '  '))", 0),
    ("lines", "n = int(input())\nfor _ in range(n): print(input(), end='\\n\\n')", 0), ("lines", "import sys\nprint(''.join(sys.stdin.readlines()[1:]))", 0, 1),
    ("list", S + "pair(self, n: List[int], t: int) -> List[int]:\n        return [0, 1]", 1), ("list", S + "pair(self, n, t):\n        return (0, 1)", 1),
    ("list", S + "pair(self, n, t):\n        d = defaultdict(int)\n        return [d['a'], 1]", 1), ("list", S + "pair(self, n, t):\n        return [1, 0]", 0),
    ("list", S + "pair(self, n, t):\n        return {0, 1}", 0), ("list", S + "pair(self, n, t):\n        return [0.0, True]", 1), ("list", S + "pair(self, n):\n        return [0, 1]", 0),
    ("list", S + "other(self, n, t):\n        return [0, 1]", 0), ("list", "def pair(n, t): return [0, 1]", 1), ("list", S + "pair(self, n, t):\n        return '[0, 1]'", 0),
    ("list", S + "pair(self, n, t):\n        print('seen')\n        return list(range(2))", 1), ("list", S + "pair(self, n, t):\n        n.clear()\n        return [0, 1]", 1),
    ("list", "from typing import List\n" + S + "pair(self, n, t):\n        return range(2)", 0), ("list", S + "pair(self, n, t):\n        return None", 0),
    ("value", S + "mean(self, n):\n        return sum(n) / len(n)", 1), ("value", S + "mean(self, n):\n        return math.fsum(n) / 2", 1), ("value", S + "mean(self, n):\n        return statistics.mean(n)", 1),
    ("value", S + "mean(self, n):\n        return 1.5", 0), ("value", S + "mean(self, n):\n        return sum(n) / len(n) + 1e-12", 0), ("value", S + "mean(self, n):\n        return Decimal(sum(n)) / 2", 0),
    ("deep", S + "depth(self, n):\n        return 0 if n == 0 else 1 + self.depth(n - 1)", 1), ("deep", S + "depth(self, n):\n        @cache\n        def f(k): return 0 if k == 0 else 1 + f(k - 1)\n        return f(n)", 1),
]  # fmt: skip
"""The public grader's standard input gives readlines no ends of lines."""

HUMANEVAL = {
    "double": {"prompt": "from typing import List\n\n\ndef double(numbers: List[int]) -> List[int]:\n    '''Each twice.'''\n", "entry_point": "double",
               "test": "def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n    assert candidate([]) == []\n"},
    "root": {"prompt": "import math\n\n\ndef poly(xs, x):\n    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n\n\ndef root(xs):\n    '''A zero.'''\n", "entry_point": "root",
             "test": "def check(candidate):\n    for xs in ([-2.0, 1.0], [6.0, 3.0]):\n        assert abs(poly(xs, candidate(list(xs)))) < 1e-4\n"},
    "count": {"prompt": "def count(text):\n    '''Letters by number.'''\n", "entry_point": "count",
              "test": "def check(candidate):\n    assert candidate('aab') == {'a': 2, 'b': 1}\n    assert candidate('') == {}\n"},
    "even": {"prompt": "def even(n):\n    '''Whether n is even.'''\n", "entry_point": "even",
             "test": "def check(candidate):\n    assert candidate(4) == True, 'four'\n    assert not candidate(3)\n"},
    "divide": {"prompt": "def divide(a, b):\n    '''The pair of quotient and rest.'''\n", "entry_point": "divide",
               "test": "def check(candidate):\n    assert candidate(7, 2) == (3, 1)\n    try:\n        candidate(1, 0)\n        assert False\n    except ZeroDivisionError:\n        pass\n"},
}  # fmt: skip
HUMANEVAL_ANSWERS = [
    ("double", "    return [2 * n for n in numbers]\n", 1), ("double", "    return list(map(lambda n: n * 2, numbers))\n", 1), ("double", "    return (2 * n for n in numbers)\n", 0),
    ("double", "    return tuple(2 * n for n in numbers)\n", 0), ("double", "    return numbers * 2\n", 0), ("double", "    return None\n", 0), ("double", "    pass\n", 0), ("double", "    return [2.0 * n for n in numbers]\n", 1),
    ("double", "    import numpy\n    return (2 * numpy.array(numbers, int)).tolist()\n", 0, 1), ("double", "    out: List[int] = []\n    for n in numbers: out.append(n + n)\n    return out\n", 1), ("double", "    return helper(numbers)\n\n\ndef helper(n):\n    return [2 * x for x in n]\n", 1),
    ("double", "    numbers.append(1)\n    return [2 * n for n in numbers[:-1]]\n", 1), ("double", "    print(numbers)\n    return [n + n for n in numbers]\n", 1), ("double", "    return [2 * n for n in numbers\n", 0), ("double", "    raise ValueError\n", 0),
    ("root", "    return -xs[0] / xs[1]\n", 1), ("root", "    return xs[0] / xs[1]\n", 0), ("root", "    return -xs[0] / xs[1] + 1e-6\n", 1), ("root", "    return -xs[0] / xs[1] + 1\n", 0), ("root", "    low, high = -10.0, 10.0\n    while high - low > 1e-9:\n        mid = (low + high) / 2\n        low, high = (mid, high) if poly(xs, mid) < 0 else (low, mid)\n    return low\n", 1),
    ("root", "    return None\n", 0), ("root", "    return '2'\n", 0), ("root", "    import numpy\n    return float(numpy.roots(xs[::-1])[0])\n", 0, 1), ("root", "    return math.inf\n", 0), ("root", "    return complex(-xs[0] / xs[1])\n", 0),
    ("count", "    from collections import Counter\n    return Counter(text)\n", 1), ("count", "    from collections import Counter\n    return dict(Counter(text))\n", 1), ("count", "    from collections import defaultdict\n    d = defaultdict(int)\n    for c in text: d[c] += 1\n    return d\n", 1),
    ("count", "    return {c: text.count(c) for c in text}\n", 1), ("count", "    return {c: 1 for c in text}\n", 0), ("count", "    return [(c, text.count(c)) for c in set(text)]\n", 0), ("count", "    from collections import OrderedDict\n    return OrderedDict((c, text.count(c)) for c in text)\n", 1),
    ("even", "    return n % 2 == 0\n", 1), ("even", "    return not n & 1\n", 1), ("even", "    return 1 - n % 2\n", 1), ("even", "    return n % 2\n", 0), ("even", "    return 'yes' if n % 2 == 0 else ''\n", 0), ("even", "    import numpy\n    return numpy.int64(n) % 2 == 0\n", 0, 1),
    ("divide", "    return divmod(a, b)\n", 1), ("divide", "    return a // b, a % b\n", 1), ("divide", "    return [a // b, a % b]\n", 0), ("divide", "    return (a // b, a % b) if b else None\n", 0), ("divide", "    if b == 0: raise ValueError\n    return a // b, a % b\n", 0),
    ("divide", "    from collections import namedtuple\n    return namedtuple('P', 'q r')(*divmod(a, b))\n", 1, 0),
]  # fmt: skip
"""The public grader's guard keeps numpy from being imported. The last: a class of the program's own may be equal to
anything."""

MBPP = {
    "area": {"text": "area", "code": "def area(r):\n    return 3.5 * r", "test_list": ["assert area(2) == 7.0", "assert area(0) == 0"], "test_setup_code": "", "challenge_test_list": []},
    "common": {"text": "common", "code": "def common(a, b):\n    return set(a) & set(b)", "test_list": ["assert set(common((1, 2), (2, 3))) == {2}", "assert set(common((1,), (2,))) == set()"], "test_setup_code": ""},
    "chain": {"text": "chain", "code": "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\ndef first(pairs): return pairs[0].a", "test_list": ["assert first([Pair(3, 4)]) == 3", "assert first([Pair(5, 6), Pair(1, 2)]) == 5"], "test_setup_code": ""},
    "close": {"task_id": 1, "prompt": "close", "code": "def half(x):\n    return x / 2", "test_imports": ["import math"], "test_list": ["assert math.isclose(half(3), 1.5, rel_tol=1e-9)", "assert half(0) == 0"]},
    "text": {"text": "text", "code": "def text(n):\n    return str(n)", "test_list": ["assert text(1) == '1'", "assert text(12) == '12'", "assert text(-1) == '-1'"], "test_setup_code": ""},
}  # fmt: skip
MBPP_ANSWERS = [
    ("area", "def area(r): return 3.5 * r", 1), ("area", "def area(r): return 7 * r / 2", 1), ("area", "area = lambda r: r * 3.5", 1), ("area", "def area(r): return 7", 0), ("area", "def area(r): return '7.0'", 0), ("area", "def area(r, k=3.5): return k * r", 1), ("area", "def surface(r): return 3.5 * r", 0), ("area", "class area:\n    def __init__(self, r): self.r = r", 0),
    ("common", "def common(a, b): return set(a) & set(b)", 1), ("common", "def common(a, b): return [x for x in a if x in b]", 1), ("common", "def common(a, b): return tuple(set(a).intersection(b))", 1), ("common", "def common(a, b): return {x: 1 for x in a if x in b}", 1), ("common", "def common(a, b): return a", 0), ("common", "def common(a, b): return None", 0), ("common", "def common(a, b): return a + b", 0),
    ("common", "def common(a, b): return frozenset(a) & frozenset(b)", 1), ("common", "def common(*lists): return sorted(set.intersection(*map(set, lists)))", 1), ("common", "def common(a, b):\n    for x in a:\n        if x in b: yield x", 1, 0),
    ("chain", "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\ndef first(pairs): return pairs[0].a", 1), ("chain", "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\ndef first(pairs): return pairs[0].b", 0), ("chain", "def first(pairs): return 3", 0),
    ("chain", "from collections import namedtuple\nPair = namedtuple('Pair', 'a b')\ndef first(pairs): return pairs[0].a", 1), ("chain", "from dataclasses import dataclass\n@dataclass\nclass Pair:\n    a: int\n    b: int\ndef first(pairs): return next(iter(pairs)).a", 1), ("chain", "class Pair:\n    def __init__(self, a): self.a = a\ndef first(pairs): return pairs[0].a", 0), ("chain", "def Pair(a, b): return [a, b]\ndef first(pairs): return pairs[0][0]", 1, 0),
    ("close", "def half(x): return x / 2", 1), ("close", "def half(x): return x * .5", 1), ("close", "def half(x): return x // 2", 0), ("close", "def half(x): return x / 2 + 1e-12 * x", 1), ("close", "def half(x): return x / 2 + 1e-6", 0), ("close", "import math\ndef half(x): return math.ldexp(x, -1)", 1), ("close", "from fractions import Fraction\ndef half(x): return float(Fraction(x, 2))", 1), ("close", "def half(x): return [x / 2]", 0),
    ("text", "def text(n): return str(n)", 1), ("text", "def text(n): return f'{n}'", 1), ("text", "def text(n): return n", 0), ("text", "def text(n): return repr(n)", 1), ("text", "def text(n): return ''.join(map(str, [n]))", 1), ("text", "def text(n): return str(abs(n))", 0), ("text", "text = str", 1), ("text", "def text(n): return '%d' % n", 1), ("text", "def text(n): return str(n).encode()", 0), ("text", "def text(n): return str(n) + ' '", 0), ("text", "import sys\ndef text(n): sys.exit(0)", 0),
]  # fmt: skip
"""Where the public grader says 1 and this one 0: a generator is no data, and what a function of the answer's other than the
one asked for gives is not taken for a value, because such functions could be the judge."""


def livecodebench_record(name: str) -> dict[str, object]:
    problem = LIVECODEBENCH[name]
    function = problem.get("function")
    kind = "functional" if function else "stdin"
    tests = [{"input": stdin, "output": output, "testtype": kind} for stdin, output in problem["tests"]]
    return {
        "question_content": name, "starter_code": f"class Solution:\n    def {function}" if function else "", "public_test_cases": json.dumps(tests[:1]),
        "private_test_cases": json.dumps(tests[1:]), "metadata": json.dumps({"func_name": function} if function else {}),
    }  # fmt: skip


APPS = {
    "mean": {"inputs": ["1 2\n", "1 3\n", "1 1\n"], "outputs": ["1.5\n", "2\n", ["1"]]},
    "table": {"inputs": ["2\n"], "outputs": ["1 2\n2 4\n"]},
    "add": {"fn_name": "total", "inputs": [[1, 2], [[1], [2]]], "outputs": [3, [[1, 2]]]},
}
MEAN = "a, b = map(int, input().split())\n"
APPS_ANSWERS = [
    ("mean", MEAN + "print((a + b) / 2)", 1), ("mean", MEAN + "print('%.9f' % ((a + b) / 2))", 1), ("mean", MEAN + "print((a + b) / 2 + 1e-7)", 1), ("mean", MEAN + "print((a + b) / 2 + 1e-3)", 0),
    ("mean", MEAN + "print((a + b) // 2)", 0), ("mean", MEAN + "print(' ', (a + b) / 2, end='  \\n\\n')", 1), ("mean", MEAN + "print((a + b) / 2, 'units')", 0), ("mean", MEAN + "print('mean', (a + b) / 2)", 0),
    ("mean", MEAN + "from fractions import Fraction\nprint(float(Fraction(a + b, 2)))", 1), ("mean", MEAN + "print(a)", 0), ("mean", "print(1.5)", 0), ("mean", "", 0), ("mean", MEAN + "print(statistics.mean([a, b]))", 1),
    ("mean", "import sys\na, b = map(int, sys.stdin.readline().split())\nprint(a + (b - a) / 2)", 1), ("mean", MEAN + "print(float('nan'))", 0), ("mean", MEAN + "print(float('inf'))", 0), ("mean", MEAN + "raise SystemExit", 0),
    ("mean", MEAN + "print((a + b) / 2); raise SystemExit", 1), ("mean", MEAN + "print((a + b) / 2); raise ValueError", 0), ("mean", "while True: pass", 0), ("mean", MEAN + "print(f'{(a + b) / 2:e}')", 1),
    ("table", "n = int(input())\nfor i in range(1, n + 1): print(*[i * j for j in range(1, n + 1)])", 1), ("table", "print('1 2')\nprint('2 4')", 1), ("table", "print('1 2 2 4')", 0), ("table", "print('1\\n2\\n2\\n4')", 0), ("table", "print('1 2\\n\\n2 4')", 1),
    ("table", "print('1  2 \\n 2  4')", 1), ("table", "print('2 1\\n2 4')", 0), ("table", "print('2 4\\n1 2')", 0), ("table", "print('1 2\\n2 4.0')", 1), ("table", "print('1 2\\n2 5')", 0), ("table", "print('1, 2\\n2, 4')", 0),
    ("add", "def total(a, b): return a + b", 1), ("add", "class Solution:\n    def total(self, a, b): return a + b", 1), ("add", "def total(a, b): return b + a", 0), ("add", "def total(a, b): return [a + b]", 0), ("add", "def total(*v): return reduce(operator.add, v)", 1),
    ("add", "def total(a, b): return str(a + b)", 0), ("add", "def plus(a, b): return a + b", 0), ("add", "def total(a): return a", 0), ("add", "total = lambda a, b: a + b", 1), ("add", "def total(a, b): print(a + b)", 0),
]  # fmt: skip


def apps_record(name: str) -> dict[str, object]:
    return {
        "question": name,
        "input_output": json.dumps(APPS[name]),
        "solutions": "[]",
        "difficulty": "interview",
        "starter_code": "",
    }


HUMANEVAL_PLUS = {
    "double": {"prompt": "from typing import List\n\n\ndef double(numbers: List[int]) -> List[int]:\n    '''Each twice.'''\n", "canonical_solution": "    return [2 * n for n in numbers]\n",
               "base_input": [[[1, 2]], [[]]], "plus_input": [[[10**25 + 1, -3]], [[0, 0, 7]]], "atol": 0},
    "mean": {"prompt": "def mean(xs):\n    '''Of numbers.'''\n", "canonical_solution": "    return sum(xs) / len(xs)\n",
             "base_input": [[[1.0, 2.0]]], "plus_input": [[[0.1, 0.2, 0.3]], [[1e9, 1.0]], [[1.0, 3.0]]], "atol": 1e-06},
    "find_zero": {"prompt": "import math\n\n\ndef poly(xs: list, x: float):\n    return sum([coeff * math.pow(x, i) for i, coeff in enumerate(xs)])\n\n\ndef find_zero(xs: list):\n    '''One zero of a polynomial with an even number of coefficients.'''\n",
                  "canonical_solution": "    low, high = -100.0, 100.0\n    while high - low > 1e-10:\n        middle = (low + high) / 2\n        if poly(xs, middle) * poly(xs, low) > 0: low = middle\n        else: high = middle\n    return low\n",
                  "base_input": [[[1, 2]]], "plus_input": [[[-6, 11, -6, 1]], [[10, -3]]], "atol": 0.0001},
    "longest": {"prompt": "from typing import List, Optional\n\n\ndef longest(strings: List[str]) -> Optional[str]:\n    '''The first longest; None of none.'''\n", "canonical_solution": "    return max(strings, key=len) if strings else None\n",
                "base_input": [[[]], [["a", "b"]]], "plus_input": [[["a", "bb", "cc"]], [[""]]], "atol": 0},
    "divide": {"prompt": "def divide(a, b):\n    '''Quotient and rest.'''\n", "canonical_solution": "    return a // b, a % b\n", "base_input": [[7, 2]], "plus_input": [[-7, 2], [0, 3]], "atol": 0},
    "count": {"prompt": "def count(text):\n    '''Letters by number.'''\n", "canonical_solution": "    return {c: text.count(c) for c in text}\n", "base_input": [["aab"]], "plus_input": [[""], ["xyz"]], "atol": 0},
}  # fmt: skip
HUMANEVAL_PLUS_ANSWERS = [
    ("double", "    return [2 * n for n in numbers]\n", 1), ("double", "    return list(map(lambda n: n + n, numbers))\n", 1), ("double", "    return numbers * 2\n", 0), ("double", "    return tuple(2 * n for n in numbers)\n", 0),
    ("double", "    return [2.0 * n for n in numbers]\n", 0), ("double", "    return [n + n for n in numbers if n]\n", 0), ("double", "    return (2 * n for n in numbers)\n", 0), ("double", "    for i in range(len(numbers)): numbers[i] *= 2\n    return numbers\n", 1),
    ("double", "    print(numbers)\n    return [n << 1 for n in numbers]\n", 1), ("double", "    raise ValueError\n", 0), ("double", "    return [2 * n for n in numbers\n", 0), ("double", "    return helper(numbers)\n\n\ndef helper(n):\n    return [2 * x for x in n]\n", 1),
    ("double", "    import numpy\n    return (2 * numpy.array(numbers, object)).tolist()\n", 1), ("double", "    import sys\n    sys.exit(0)\n", 0), ("double", "    return [2, 4]\n", 0), ("double", "def double(numbers):\n    return [n * 2 for n in numbers]\n", 1),
    ("mean", "    return sum(xs) / len(xs)\n", 1), ("mean", "    import statistics\n    return statistics.fmean(xs)\n", 1), ("mean", "    return sum(xs) / len(xs) + 1e-7\n", 1), ("mean", "    return sum(xs) / len(xs) + 1e-3\n", 0), ("mean", "    return sum(xs) // len(xs)\n", 0),
    ("mean", "    return str(sum(xs) / len(xs))\n", 0), ("mean", "    from fractions import Fraction\n    return sum(map(Fraction, xs)) / len(xs)\n", 0), ("mean", "    return round(sum(xs) / len(xs), 6)\n", 1), ("mean", "    return round(sum(xs) / len(xs), 1)\n", 1),
    ("mean", "    m = sum(xs) / len(xs)\n    return int(m) if m == int(m) else m\n", 1), ("mean", "    import numpy\n    return numpy.mean(xs)\n", 1), ("mean", "    import numpy\n    return numpy.mean(xs) + 1e-9\n", 0, 1), ("mean", "    return [sum(xs) / len(xs)]\n", 0), ("mean", "    return float('nan')\n", 0),
    ("find_zero", "    low, high = -1000.0, 1000.0\n    while high - low > 1e-9:\n        middle = (low + high) / 2\n        if poly(xs, middle) * poly(xs, low) > 0: low = middle\n        else: high = middle\n    return low\n", 1),
    ("find_zero", "    return -xs[0] / xs[1]\n", 0), ("find_zero", "    import numpy\n    return float(min(numpy.roots(xs[::-1]).real))\n", 1), ("find_zero", "    return None\n", 0), ("find_zero", "    return math.inf\n", 0), ("find_zero", "    return '1'\n", 0), ("find_zero", "    return {2: -xs[0] / xs[1], 4: 1 + 1e-6}[len(xs)]\n", 1), ("find_zero", "    return {2: -xs[0] / xs[1], 4: 1.01}[len(xs)]\n", 0),
    ("longest", "    return max(strings, key=len, default=None)\n", 1), ("longest", "    return max(strings, key=len, default='')\n", 0), ("longest", "    return max(reversed(strings), key=len) if strings else None\n", 0), ("longest", "    if strings: return sorted(strings, key=len, reverse=True)[0]\n", 1), ("longest", "    return max(strings, key=len)\n", 0),
    ("divide", "    return divmod(a, b)\n", 1), ("divide", "    return [a // b, a % b]\n", 0), ("divide", "    return float(a // b), float(a % b)\n", 1), ("divide", "    return int(a / b), a - int(a / b) * b\n", 0), ("divide", "    from collections import namedtuple\n    return namedtuple('P', 'q r')(*divmod(a, b))\n", 1, 0),
    ("count", "    from collections import Counter\n    return Counter(text)\n", 1), ("count", "    d = {}\n    for c in text: d[c] = d.get(c, 0) + 1\n    return d\n", 1), ("count", "    return {c: 1 for c in text}\n", 0), ("count", "    return [(c, text.count(c)) for c in set(text)]\n", 0), ("count", "    return {c: text.count(c) for c in text}.items()\n", 0),
]  # fmt: skip
"""Where EvalPlus says something else: it does not take a number of numpy's for near (its type is another), and a class of the
program's own may be equal to anything."""

MBPP_PLUS = {
    "Mbpp/2": {"entry_point": "similar_elements", "canonical_solution": "def similar_elements(test_tup1, test_tup2):\n  return tuple(set(test_tup1) & set(test_tup2))\n", "base_input": [[[3, 4, 5, 6], [5, 7, 4, 10]]], "plus_input": [[[1, 2], [3]]],
               "atol": 0, "assertion": "\nassert set(similar_elements((3, 4, 5, 6),(5, 7, 4, 10))) == set((4, 5))\n"},
    "Mbpp/434": {"entry_point": "text_match_three", "canonical_solution": "import re\ndef text_match_three(text):\n        return re.search('ab{3}?', text)\n", "base_input": [["ac"], ["abbb"]], "plus_input": [["cabbbb"], [""]], "atol": 0, "assertion": "assert not text_match_three('ac')"},
    "Mbpp/295": {"entry_point": "sum_div", "canonical_solution": "def sum_div(number):\n    if number == 1: return 1\n    return sum(i for i in range(1, number) if number % i == 0)\n", "base_input": [[8], [12]], "plus_input": [[1], [97]], "atol": 0, "assertion": "assert sum_div(8)==7"},
    "Mbpp/581": {"entry_point": "surface_Area", "canonical_solution": "def surface_Area(b,s):\n  return 2 * b * s + pow(b,2)\n", "base_input": [[3, 4]], "plus_input": [[1, 2]], "atol": 0, "assertion": "assert surface_Area(3,4)==33"},
    "Mbpp/558": {"entry_point": "digit_distance_nums", "canonical_solution": "def digit_distance_nums(n1, n2):\n    return sum([abs(int(c1) - int(c2)) for c1, c2 in zip(str(n1), str(n2))])\n", "base_input": [[1, 2], [23, 56]], "plus_input": [[123, 45]], "atol": 0, "assertion": "assert digit_distance_nums(1,2) == 1"},
    "Mbpp/85": {"entry_point": "surfacearea_sphere", "canonical_solution": "import math\ndef surfacearea_sphere(r):\n  return 4*math.pi*(r**2)\n", "base_input": [[10]], "plus_input": [[0.5], [0]], "atol": 0, "assertion": "assert math.isclose(surfacearea_sphere(10), 1256.6370614359173, rel_tol=0.001)"},
    "Mbpp/63": {"entry_point": "max_difference", "canonical_solution": "def max_difference(test_list):\n  return max(abs(a - b) for a, b in test_list)\n", "base_input": [[[[3, 5], [1, 7]]]], "plus_input": [[[[2, 2]]]], "atol": 0, "assertion": "assert max_difference([(3, 5), (1, 7)]) == 6"},
    "Mbpp/278": {"entry_point": "count_first_elements", "canonical_solution": "def count_first_elements(t):\n    for n, x in enumerate(t):\n        if isinstance(x, tuple): break\n    return n\n", "base_input": [[[1, 5, 7, [4, 6], 10]]], "plus_input": [[[1, [2, 3], 4]], [[[1], 2, 3, 4, 5]]], "atol": 0, "assertion": "assert count_first_elements((1, 5, 7, (4, 6), 10) ) == 3"},
    "Mbpp/624": {"entry_point": "count_integer", "canonical_solution": "def count_integer(list1):\n    return sum(isinstance(x, int) for x in list1)\n", "base_input": [[[1, 2, "abc", 1.2]]], "plus_input": [[["1", 2]], [[]]], "atol": 0, "assertion": "assert count_integer([1,2,'abc',1.2]) == 2"},
    "Mbpp/124": {"entry_point": "angle_complex", "canonical_solution": "import cmath\ndef angle_complex(a,b):\n  return cmath.phase(a+b)\n", "base_input": [["0.0", "1j"]], "plus_input": [["-1.0", "2j"]], "atol": 0, "assertion": "assert math.isclose(angle_complex(0,1j), 1.5707963267948966, rel_tol=0.001)"},
}  # fmt: skip
MBPP_PLUS_ANSWERS = [
    ("Mbpp/2", "def similar_elements(a, b): return tuple(set(a) & set(b))", 1), ("Mbpp/2", "def similar_elements(a, b): return [x for x in a if x in b]", 1), ("Mbpp/2", "def similar_elements(a, b): return set(a).intersection(b)", 1), ("Mbpp/2", "def similar_elements(a, b): return sorted(set(a) & set(b), reverse=True)", 1),
    ("Mbpp/2", "def similar_elements(a, b): return a", 0), ("Mbpp/2", "def similar_elements(a, b): return None", 0), ("Mbpp/2", "def similar_elements(a, b): return {x: a for x in a if x in b}", 1), ("Mbpp/2", "def similar_elements(a, b): return {a: 1, b: 2} and tuple(x for x in a if x in b)", 1), ("Mbpp/2", "def similar_elements(a, b): return '45'", 0),
    ("Mbpp/2", "def similar_elements(a, b): return (x for x in a if x in b)", 1, 0), ("Mbpp/434", "import re\ndef text_match_three(t): return re.search('abbb', t)", 1), ("Mbpp/434", "def text_match_three(t): return 'abbb' in t", 1), ("Mbpp/434", "def text_match_three(t): return 'Found a match!' if 'abbb' in t else 'Not matched!'", 0),
    ("Mbpp/434", "def text_match_three(t): return t if 'abbb' in t else None", 1), ("Mbpp/434", "def text_match_three(t): return True", 0), ("Mbpp/434", "def text_match_three(t): return int('abbb' in t) or None", 1), ("Mbpp/434", "def text_match_three(t): return int('abbb' in t)", 0), ("Mbpp/434", "import re\ndef text_match_three(t): return bool(re.match('abbb', t))", 0),
    ("Mbpp/295", "def sum_div(n): return sum(i for i in range(1, n) if n % i == 0) if n > 1 else 1", 1), ("Mbpp/295", "def sum_div(n): return sum(i for i in range(1, n) if n % i == 0)", 1), ("Mbpp/295", "def sum_div(n): return sum(i for i in range(1, n + 1) if n % i == 0)", 0), ("Mbpp/295", "def sum_div(n): return float(sum(i for i in range(1, n) if n % i == 0))", 1), ("Mbpp/295", "def sum_div(n): return 7", 0),
    ("Mbpp/581", "def surface_Area(b, s): return b * b + 2 * b * s", 1), ("Mbpp/581", "import math\ndef surface_Area(b, h): return round(b**2 + 2 * b * math.sqrt((b / 2)**2 + h**2))", 1), ("Mbpp/581", "import math\ndef surface_Area(b, h): return b**2 + 2 * b * math.sqrt((b / 2)**2 + h**2)", 0), ("Mbpp/581", "def surface_Area(b, s): return 4 * b * s", 0), ("Mbpp/581", "def surface_Area(b, s): return str(b * b + 2 * b * s)", 0),
    ("Mbpp/558", "def digit_distance_nums(a, b): return sum(abs(int(x) - int(y)) for x, y in zip(str(a), str(b)))", 1), ("Mbpp/558", "def digit_distance_nums(a, b):\n    n = max(len(str(a)), len(str(b)))\n    return sum(abs(int(x) - int(y)) for x, y in zip(str(a).zfill(n), str(b).zfill(n)))", 1), ("Mbpp/558", "def digit_distance_nums(a, b): return abs(a - b)", 0), ("Mbpp/558", "def digit_distance_nums(a, b): return sum(map(int, str(abs(a - b))))", 0),
    ("Mbpp/85", "import math\ndef surfacearea_sphere(r): return 4 * math.pi * r * r", 1), ("Mbpp/85", "def surfacearea_sphere(r): return 4 * 3.141592653589793 * r ** 2", 1), ("Mbpp/85", "def surfacearea_sphere(r): return 4 * 3.14 * r ** 2", 0), ("Mbpp/85", "def surfacearea_sphere(r): return 4 * 3.14159265359 * r ** 2", 1), ("Mbpp/85", "def surfacearea_sphere(r): return int(4 * 3.141592653589793 * r ** 2)", 0), ("Mbpp/85", "def surfacearea_sphere(r): return [4 * 3.141592653589793 * r ** 2]", 0),
    ("Mbpp/63", "def max_difference(pairs): return max(abs(a - b) for a, b in set(pairs))", 1), ("Mbpp/63", "def max_difference(pairs): return max(abs(p[0] - p[1]) for p in pairs)", 1), ("Mbpp/63", "def max_difference(pairs): return max(a - b for a, b in pairs)", 0), ("Mbpp/63", "def max_difference(pairs): return max(pairs)", 0), ("Mbpp/63", "def max_difference(pairs): return max(abs(a - b) for a, b in pairs if isinstance((a, b), tuple) and (a, b) in {p: 1 for p in pairs})", 1), ("Mbpp/63", "def difference(pairs): return max(abs(a - b) for a, b in pairs)", 0),
    ("Mbpp/278", "def count_first_elements(t): return next(n for n, x in enumerate(t) if type(x) is tuple)", 1), ("Mbpp/278", "def count_first_elements(t): return sum(type(x) is not tuple for x in t)", 0), ("Mbpp/278", "def count_first_elements(t): return next(n for n, x in enumerate(t) if type(x) is list)", 0),
    ("Mbpp/624", "def count_integer(x): return len([n for n in x if type(n) is int])", 1), ("Mbpp/624", "def count_integer(x): return sum(str(n).isdigit() for n in x)", 0),
    ("Mbpp/124", "import cmath\ndef angle_complex(a, b): return cmath.phase(complex(a) + b)", 1), ("Mbpp/124", "import cmath\ndef angle_complex(a, b): return cmath.polar(a + b)[1]", 1), ("Mbpp/124", "import math\ndef angle_complex(a, b): return math.atan2(b.imag, a + b.real)", 1), ("Mbpp/124", "import math\ndef angle_complex(a, b): return math.atan(b.imag / a)", 0), ("Mbpp/124", "import math\ndef angle_complex(a, b): return math.degrees(math.atan2(b.imag, a))", 0),
]  # fmt: skip
"""Where EvalPlus says something else: a generator is no data."""


def evalplus_record(name: str) -> dict[str, object]:
    """As EvalPlus's HumanEvalPlus.jsonl and MbppPlus.jsonl have it."""
    if name in MBPP_PLUS:
        problem = MBPP_PLUS[name]
        prompt = f'"""\nWrite {problem["entry_point"]}.\n{str(problem["assertion"]).strip()}\n"""\n'
        return {"task_id": name, "prompt": prompt, "contract": "", **problem}
    return {"task_id": f"HumanEval/{name}", "entry_point": name, "contract": "", "test": "", **HUMANEVAL_PLUS[name]}
