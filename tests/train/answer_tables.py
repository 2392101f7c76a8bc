# ruff: noqa: E501
"""Answers, right and wrong, and the verdicts of the public graders.

MATHEMATICS: (right, answer, verdict, public): `public` is math-verify's verdict on the two in boxes, as its package gives
it, or None where the answer is more than a box. math-verify differs from the verdict where it takes a part for the whole
("5 minutes", "10 million"), a tuple or an interval for a set, or one thing for a list, and where it does not read
10\\,000, a trailing stop or text around numbers.
"""

from __future__ import annotations

MATHEMATICS = [
    ("42", "42", 1, 1), ("42", "We get \\boxed{41}, no: \\boxed{42}", 1, None), ("41", "\\boxed{41}, no: \\boxed{42}", 0, None),
    ("42", "so $\\boxed{42}$ apples, \\boxed{", 1, None), ("42", "\\boxed 42", 1, None), ("42", "\\fbox{42}", 1, None),
    ("72", "48/2 = 24, 48 + 24 = 72\n#### 72", 1, None), ("72", "#### 73", 0, None), ("72", "The answer is 72.", 1, None),
    ("\\frac{3}{4}", "0.75", 1, 1), ("\\frac34", "3/4", 1, 1), ("\\frac{3}{4}", "\\dfrac{3}{4}", 1, 1),
    ("\\frac{1}{3}", "0.333", 0, 0), ("3 \\frac{1}{2}", "3.5", 1, 1), ("\\frac{3}{4}", "\\frac{4}{3}", 0, 0),
    ("25\\%", "25\\%", 1, 1), ("25\\%", "25%", 1, 1), ("25\\%", "25", 1, 1), ("25\\%", "0.25", 1, 1), ("25\\%", "2.5", 0, 0),
    ("18", "\\$18", 1, 1), ("18", "18 \\text{ dollars}", 1, 1), ("18\\text{ cm}^2", "18", 1, 1), ("18", "18.00", 1, 1),
    ("18", "81 \\text{ dollars}", 0, 0), ("3", "\\text{3 hours}", 1, 0), ("90^\\circ", "90", 1, 1), ("90", "90^{\\circ}", 1, 1),
    ("5\\text{ minutes } 30\\text{ seconds}", "5", 0, 1),
    ("5 \\text{ minutes } 30 \\text{ seconds}", "5 minutes 30 seconds", 1, 0),
    ("1,234", "1234", 1, 1), ("1{,}234", "1,234", 1, 1), ("10\\,000", "10000", 1, 0), ("32,348", "32.348", 0, 0),
    ("540", "540.", 1, 0), ("2", "2.0000001", 0, 0), ("70", "7", 0, 0), ("-1", "1", 0, 0), ("-1", "\u22121", 1, 1),
    ("(2,3]", "(2, 3]", 1, 1), ("(2,3]", "[2,3]", 0, 0), ("(2,3)", "[2,3]", 0, 0), ("[-2,7]", "x \\in [-2, 7]", 1, 1),
    ("(-\\infty,2)\\cup(3,\\infty)", "(-\\infty, 2) \\cup (3, \\infty)", 1, 1),
    ("(-\\infty,2)\\cup(3,\\infty)", "(-\\infty, 2] \\cup (3, \\infty)", 0, 0),
    ("(1,2)", "(2,1)", 0, 0), ("(1,2)", "\\left(1, 2\\right)", 1, 1), ("(1,2)", "1,2", 0, 1), ("\\{0,1\\}", "(0,1)", 0, 1),
    ("\\{1,2\\}", "\\{2,1\\}", 1, 1), ("1,2", "2, 1", 1, 1), ("2 \\text{ or } 3", "3,2", 1, 1), ("\\text{2 and 3}", "2, 3", 1, 0),
    ("1", "1,1", 0, 1), ("12", "3,4", 0, 0), ("\\pm 2", "2,-2", 1, 1), ("\\pm 2", "2", 0, 0),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}", 1, 1),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&5\\end{pmatrix}", 0, 0),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1&2\\end{pmatrix}", 0, 0),
    ("2\\sqrt{3}", "\\sqrt{12}", 1, 1), ("\\frac{\\sqrt2}{2}", "\\frac{1}{\\sqrt2}", 1, 1), ("6\\pi", "18.85", 0, 0),
    ("x^2+2x+1", "(x+1)^2", 1, 1), ("x=5", "5", 1, 1), ("5", "x=5", 1, 1), ("y=2x+3", "2x+3", 1, 1), ("3", "3x", 0, 0),
    ("1.5 \\times 10^{3}", "1500", 1, 1), ("\\binom{5}{2}", "10", 1, 1), ("2^{10}", "1024", 1, 1), ("1+2i", "2i+1", 1, 1),
    ("\\text{Evelyn}", "Evelyn", 1, 1), ("\\text{Tuesday}", "tuesday", 1, 1), ("\\text{even}", "odd", 0, 0),
    ("\\text{even}", "even", 1, None), ("\\text{A, B}", "A, B", 1, 0),
    ("\\text{(C)}", "C", 1, 1), ("C", "\\text{(D)}", 0, 0), ("0", "\\emptyset", 0, 0), ("5", "", 0, 0), ("5", "\\boxed{}", 0, None),
    ("5", "cat", 0, 0), ("10\\text{ million}", "10", 0, 1), ("\\frac{7}{2} \\text{ feet}", "3.5", 1, 1), ("60", "#### 60 eggs", 1, None), ("60", "Thus **60**. #### $60$", 1, None),
]  # fmt: skip

CHOICES = {"A": "Oxygen", "B": "Carbon dioxide", "C": "Nitrogen", "D": "A gas"}
SCIENCE = [
    ("B", "B"), ("b", "B"), ("(B)", "B"), ("(b)", "B"), ("B.", "B"), ("b.", "B"), ("B)", "B"), ("B:", "B"), ("[B]", "B"),
    ("**B**", "B"), ("B. Carbon dioxide", "B"), ("b) Carbon dioxide", "B"), ("(B) Carbon dioxide", "B"),
    ("Carbon dioxide", "B"), ("carbon dioxide.", "B"), ("The answer is carbon dioxide.", "B"), ("A gas", "D"),
    ("The answer is B.", "B"), ("The answer is (B).", "B"), ("The answer is: (b)", "B"), ("Answer: B", "B"), ("answer: b", "B"),
    ("**Answer:** B", "B"), ("Answer: **(B)**", "B"), ("Final answer: B, because of it", "B"), ("The correct answer is option B.", "B"),
    ("\\boxed{B}", "B"), ("$\\boxed{\\text{B}}$", "B"), ("\\boxed{(b)}", "B"), ("\\boxed{\\text{Carbon dioxide}}", "B"),
    ("\\boxed{A}, no: \\boxed{B}", "B"), ("A or B? The answer is (B)", "B"), ("I first thought answer A, but the answer is: B", "B"),
    ("It is not A. It absorbs it.\n\nB", "B"), ("Plants take it up.\nSo the answer is B", "B"), ("I choose option B", "B"),
    ("C", "C"), ("c.", "C"), ("The answer is C because of B", "C"), ("Option C, not B", "C"), ("A. Oxygen", "A"),
    ("", ""), ("Because oxygen", ""), ("The answer is a mystery", ""), ("I do not know", ""), ("E", ""), ("Z 999", ""),
    ("\\boxed{}", ""), ("Be careful", ""), ("All of A, B, C", ""), ("The answer is not B", ""),
]  # fmt: skip
"""Answers and the choice that a reader, and MMLU-Pro's and GPQA's patterns where they match, take them for."""
