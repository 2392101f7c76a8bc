# ruff: noqa: E501
"""Answers, right and wrong, and the verdicts of the public graders (tests/train/tasks/test_public_graders.py runs them).

In AIME, HMMT, GSM8K, MMLU_PRO and GPQA the public verdict is third (for choices second), and where the verdict here is
another one it stands last, with the reason below the table.

MATHEMATICS, in the style of MATH: (right, answer, verdict, public): `public` is math-verify's verdict on the two in boxes, as its package gives
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
"""SciKnowEval's, and answers in general: the choice that a reader takes them for. SciKnowEval's own grader is in no package.
By its rule, stated by hand, a letter alone counts, then the right choice's text without another's, then the first of D, C,
B, A that has a stop, bracket, space or end of line behind it. Of the 204 pairs of these answers and a key it judges 175
alike; it calls 22 right ones wrong ("The answer is: (b)") and 7 wrong ones right ("Answer: B" where A is)."""

AIME = [
    ("204", "\\boxed{204}", 1), ("204", "So $\\boxed{204}$.", 1), ("204", "204", 1), ("204", "The answer is 204.", 1), ("204", "The final answer is \\(\\boxed{204}\\).", 1), ("204", "\\[ \\boxed{204} \\]", 1),
    ("204", "It takes $\\boxed{204}$ minutes.", 1), ("204", "\\boxed{205}", 0), ("204", "\\boxed{205}. Wait. \\boxed{204}", 1), ("204", "\\boxed{204}, no: \\boxed{205}", 0), ("204", "\\boxed{204.0}", 1), ("204", "\\boxed{204.5}", 0),
    ("33", "\\boxed{033}", 1), ("033", "\\boxed{33}", 1), ("025", "25", 1), ("25", "\\boxed{0025}", 1), ("204", "\\boxed{\\text{204}}", 1), ("204", "\\boxed{204 \\text{ minutes}}", 1), ("204", "\\boxed{m + n = 204}", 1), ("113", "\\boxed{p = 113}", 1),
    ("204", "\\boxed{\\frac{408}{2}}", 1), ("204", "\\boxed{200 + 4}", 1), ("16", "\\boxed{2^4}", 1), ("999", "\\boxed{1000 - 1}", 1), ("204", "\\boxed{204^\\circ}", 1), ("204", "\\boxed{-204}", 0), ("204", "\\boxed{20.4}", 0), ("204", "\\boxed{2040}", 0),
    ("204", "\\boxed{4}", 0), ("204", "\\boxed{402}", 0), ("204", "\\boxed{204, 205}", 0), ("204", "\\boxed{204 \\text{ or } 205}", 1, 0), ("204", "\\boxed{}", 0), ("204", "", 0), ("204", "I cannot solve it.", 0), ("0", "\\boxed{0}", 1), ("0", "\\boxed{\\emptyset}", 0),
    ("110", "\\fbox{110}", 0, 1), ("110", "\\boxed 110", 1), ("204", "**204**", 1), ("204", "Answer: $204$", 1), ("371", "\\boxed{\\mathbf{371}}", 1), ("371", "\\boxed{371.}", 0, 1), ("204", "\\boxed{\\sqrt{204}}", 0), ("204", "\\boxed{x}", 0), ("540", "\\boxed{5 4 0}", 1, 0),
]  # fmt: skip
"""Whole numbers from 0 to 999, also with zeros before them: (right, answer, verdict), 1 where math-verify or lm-eval's AIME
says so. Neither reads \\fbox, in which some solutions of MATH have their answers, or a stop in the box; lm-eval takes all
after \\text{ for a unit and drops spaces."""

HMMT = [
    ("\\frac{1}{576}", "\\boxed{\\frac{1}{576}}", 1), ("\\frac{1}{576}", "\\boxed{1/576}", 1), ("\\frac{1}{576}", "\\boxed{\\dfrac{1}{576}}", 1), ("\\frac{1}{576}", "\\boxed{\\frac{1}{24^2}}", 1), ("\\frac{1}{576}", "\\boxed{0.001736}", 1), ("\\frac{1}{576}", "\\boxed{0.00174}", 0), ("\\frac{1}{576}", "\\boxed{576}", 0),
    ("1-\\frac{2}{\\pi}", "\\boxed{1 - \\frac{2}{\\pi}}", 1), ("1-\\frac{2}{\\pi}", "\\boxed{\\frac{\\pi - 2}{\\pi}}", 1), ("1-\\frac{2}{\\pi}", "\\boxed{\\frac{2}{\\pi} - 1}", 0), ("1-\\frac{2}{\\pi}", "\\boxed{0.3634}", 0),
    ("\\frac{9 \\sqrt{23}}{23}", "\\boxed{\\frac{9}{\\sqrt{23}}}", 1), ("\\frac{9 \\sqrt{23}}{23}", "\\boxed{9\\sqrt{23}/23}", 1), ("\\frac{9 \\sqrt{23}}{23}", "\\boxed{\\frac{9\\sqrt{23}}{32}}", 0), ("8\\sqrt{10}", "\\boxed{\\sqrt{640}}", 1), ("8\\sqrt{10}", "\\boxed{8 \\sqrt 10}", 0), ("8\\sqrt{10}", "\\boxed{80}", 0),
    ("26!", "\\boxed{26!}", 1), ("26!", "\\boxed{25!\\cdot 26}", 1), ("26!", "\\boxed{26}", 0), ("2^{99}", "\\boxed{2^{99}}", 1), ("2^{99}", "\\boxed{2\\cdot 2^{98}}", 1), ("2^{99}", "\\boxed{2^{98}}", 0), ("2^{99}", "\\boxed{2^99}", 1),
    ("\\frac{-1+\\sqrt{17}}{2}, \\frac{-1-\\sqrt{17}}{2}", "\\boxed{\\frac{-1\\pm\\sqrt{17}}{2}}", 0), ("\\frac{-1+\\sqrt{17}}{2}, \\frac{-1-\\sqrt{17}}{2}", "\\boxed{\\frac{-1-\\sqrt{17}}{2}, \\frac{-1+\\sqrt{17}}{2}}", 1), ("\\frac{-1+\\sqrt{17}}{2}, \\frac{-1-\\sqrt{17}}{2}", "\\boxed{\\frac{-1+\\sqrt{17}}{2}}", 0),
    ("-984,-98,14", "\\boxed{14, -98, -984}", 1), ("-984,-98,14", "\\boxed{-984, -98, \\text{ and } 14}", 1), ("-984,-98,14", "\\boxed{-984, -98}", 0), ("-984,-98,14", "\\boxed{-984, -98, 14, 15}", 0), ("-984,-98,14", "\\boxed{-984, -98, 15}", 0),
    ("103", "\\boxed{103}", 1), ("103", "The answer is $103$.", 1), ("103", "\\boxed{301}", 0), ("3375", "\\boxed{15^3}", 1), ("3375", "\\boxed{3,375}", 1), ("\\sqrt{6}", "\\boxed{\\sqrt 6}", 1), ("\\sqrt{6}", "\\boxed{2.449}", 0), ("\\sqrt{6}", "\\boxed{\\sqrt2\\sqrt3}", 1),
    ("\\frac{\\sqrt{3}}{2}", "\\boxed{\\sin 60^\\circ}", 0), ("\\left(\\frac{1}{3}, \\frac{2}{3}\\right)", "\\boxed{\\left(\\frac13, \\frac23\\right)}", 1), ("\\left(\\frac{1}{3}, \\frac{2}{3}\\right)", "\\boxed{(\\frac23, \\frac13)}", 0), ("e^{\\pi}", "\\boxed{e^\\pi}", 1), ("\\frac{7}{18}", "\\boxed{\\frac{7}{18}} \\approx 0.389", 1), ("200", "\\boxed{200 \\text{ square units}}", 1),
]  # fmt: skip
"""Expressions and lists of them: (right, answer, verdict of math-verify), to which numbers are equal that agree to six
decimals."""

GSM8K = [
    ("72", "48/2 = 24, 48 + 24 = 72\n#### 72", 1), ("72", "#### 72", 1), ("72", "####72", 1), ("72", "#### 72.", 1), ("72", "#### $72", 1), ("72", "#### 73", 0), ("72", "It is 72.\n#### 73", 0), ("72", "It is 73.\n#### 72", 1), ("1272", "#### 1,272", 1), ("1,272", "#### 1272", 1),
    ("72", "72", 1), ("72", "$72", 1), ("72", "72.", 1), ("72", "73", 0), ("72", "7", 0), ("72", "722", 0), ("72", "-72", 0), ("-5", "#### -5", 1), ("-5", "#### 5", 0), ("72", "The answer is 72.", 1), ("72", "The answer is 72", 1), ("72", "The answer is $72.", 1), ("72", "The answer is 73.", 0),
    ("72", "So the answer is \\boxed{72}.", 1), ("72", "\\boxed{72}", 1), ("72", "\\boxed{73}", 0), ("72", "The answer is 72 eggs.", 1), ("72", "72 eggs", 1), ("72", "**72**", 1), ("72", "", 0), ("72", "I do not know.", 0), ("18", "She makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18", 1), ("18", "#### 18 dollars", 1),
    ("3", "#### 3.5", 0), ("3.5", "#### 3.5", 1), ("0", "#### 0", 1), ("0", "#### zero", 0), ("70000", "#### 70,000", 1), ("70000", "#### 70.000", 0), ("20", "#### 20%", 1), ("540", "#### 540 meters", 1), ("64", "Answer: 64", 1), ("64", "Answer: 46", 0),
    ("72", "#### 72.00", 0, 1), ("72", "72.0", 0, 1), ("0.5", "#### 1/2", 0, 1), ("72", "The answer is 72 eggs in 3 days.", 0), ("10", "#### 10 or 12", 1, 0),
]  # fmt: skip
"""(right, answer, verdict): 1 where one of lm-eval's two filters, what follows #### and the last number, finds the right
digits. They compare digits, not numbers; and of two answers the first is none."""

TEN = {label: f"{10 * number} J" for number, label in enumerate("ABCDEFGHIJ")}
MMLU_PRO = [
    ("The answer is (C).", "C"), ("Let's think step by step. W = F d = 20 J. The answer is (C).", "C"), ("the answer is C", "C"), ("The correct answer is (J).", "J"), ("answer is J", "J"), ("The answer is (I).", "I"), ("The answer is I.", "I"), ("The answer is (C) 20 J.", "C"), ("The answer is (D).", "D"),
    ("The answer is C because it is work.", "C"), ("Thus, the answer is C\n", "C"), ("The answer is (A)", "A"), ("I get 20 J, and so the answer is (C)", "C"), ("It is not (B). The answer is (C).", "C"), ("The correct answer is H", "H"), ("The answer is (E), 40 J.", "E"), ("The answer is F.", "F"), ("The answer is (G):", "G"),
    ("The answer is (B). No: the answer is (C).", "B", "C"),
    ("Answer: C", "", "C"), ("Answer: (C)", "", "C"), ("answer: C", "", "C"), ("**Answer: C**", "", "C"), ("Answer:\nC", "", "C"), ("The answer is **C**.", "", "C"), ("The answer is **(C)**.", "", "C"), ("The answer is: (C)", "", "C"), ("The answer is $\\boxed{C}$.", "", "C"),
    ("\\boxed{C}", "", "C"), ("\\boxed{(C)}", "", "C"), ("\\boxed{\\text{(C)}}", "", "C"), ("\\boxed{20 J}", "", "C"), ("C", "", "C"), ("(C)", "", "C"), ("C.", "", "C"), ("c", "", "C"), ("(c)", "", "C"), ("C. 20 J", "", "C"), ("(C) 20 J", "", "C"), ("20 J", "", "C"), ("The answer is 20 J.", "", "C"),
    ("So option C.", "", "C"), ("I would choose option (C)", "", "C"), ("The answer is (K).", ""), ("The answer is unclear.", ""), ("I do not know.", ""), ("", ""), ("A force does work.", ""), ("I think 25 J", ""), ("The answer is not (C).", ""), ("The answer is 25 J.", ""),
]  # fmt: skip
"""(answer, choice by lm-eval's pattern of MMLU-Pro, choice): the pattern knows "answer is (C)", and takes the first of two."""

FOUR = {"A": "10^-4 eV", "B": "10^-11 eV", "C": "10^-8 eV", "D": "10^-9 eV"}
GPQA = [
    ("The correct answer is (B)", "B"), ("The correct answer is (B).", "B"), ("The answer is (B).", "B"), ("the answer is (b)", "", "B"), ("Answer: (B)", "B"), ("answer: (B)", "B"), ("(B)", "B"), ("(b)", "", "B"), ("(B) 10^-11 eV", "B"), ("The answer is (B) 10^-11 eV.", "B"), ("It is not (A). The answer is (B).", "B"),
    ("(A) is too large, (C) too small: the answer is (B).", "B"), ("Between (A) and (B), the answer is (B).", "B"), ("The answer is (A). No, the answer is (B).", "B"), ("I choose option (B)", "B"), ("The correct answer is (D)", "D"), ("The correct answer is (A).", "A"), ("**The correct answer is (B)**", "B"), ("The correct answer is **(B)**.", "B"), ("\\boxed{(B)}", "B"),
    ("The answer is (B), because h / t is 10^-7 eV.", "B"), ("Reasoning.\n\nThe correct answer is (C)", "C"), ("Reasoning.\n(C)", "C"),
    ("B", "", "B"), ("b", "", "B"), ("B.", "", "B"), ("B)", "", "B"), ("B. 10^-11 eV", "B"), ("The correct answer is B", "", "B"), ("The correct answer is B.", "", "B"), ("Answer: B", "B"), ("**Answer:** B", "", "B"), ("\\boxed{B}", "", "B"), ("$\\boxed{\\text{B}}$", "", "B"), ("10^-11 eV", "B"),
    ("The answer is 10^-11 eV.", "B"), ("Final answer: B", "B"), ("Option B.", "", "B"), ("The correct answer is (insert answer here)", ""), ("The answer is (E).", "", ""), ("I am not sure.", ""), ("", ""), ("A guess", ""), ("The correct answer is 10^-7 eV", ""), ("Neither A nor B", ""),
]  # fmt: skip
"""(answer, choice by lm-eval's flexible pattern of GPQA, choice): the pattern knows the last capital in brackets,
a choice's text, and a letter after a colon."""
