"""Texts that models write, for the renderer's tests: what is told apart, what is ordinary, what means harm."""

from __future__ import annotations

MARKDOWN = {
    "headings": "# One\n\nText *a* and **b** and ***c***.\n\n## Two ##\n\nSetext\n======\n\nAnother\n---\n\n### `code` in **it**\n",
    "lists": "- a\n- b\n  - c\n    still c\n  - d\n\n1. one\n2. two\n\n   more of two\n3. three\n\n* other\n+ another\n",
    "loose": "1. First:\n\n   ```python\n   print(1)\n   ```\n\n2. Second:\n\n   > quoted\n   > more\n\n3. Third\n\nEnd.",
    "tasks": "- [ ] open\n- [x] done\n- [X] **also** done\n- [] none\n- [ ]\n\n[ ] not a task\n",
    "fence": "Before\n```python\ndef f(x):\n    return x ** 2\n\n\nprint(f(3))\n```\nAfter `inline` code.",
    "fences": "````markdown\n```js\nlet a = `b`;\n```\n````\n\n~~~\ntilde ``` inside\n~~~\n\n```\nno language\n```\n",
    "unclosed fence": "Look:\n\n```rust\nfn main() {\n    println!(\"hi\");\n",
    "empty fences": "```\n```\n\n```python\n\n```\n\ntext\n\n```c++\n#include <x>\n```\n",
    "indented": "Text\n\n    four spaces\n    <b>more</b>\n\nText\n",
    "table": "Text\n| Name | Value | Note |\n|:-----|------:|:----:|\n| a `x|y` | 1 | **b** |\n| c \\| d | 2 |\n| e | 3 | f | g |\n\nEnd\n",
    "no table": "| only a bar\n\n| a | b |\n|---|---x|\n\n| a | b |\nplain\n",
    "table in list": "- item\n\n  | a | b |\n  |---|---|\n  | 1 | 2 |\n\n- next\n",
    "emphasis": "**bold *nested* bold** _under_ snake_case_name 2*3*4 **unclosed and *half* `code **` ~~gone~~ ~one~ ** alone * star",
    "links": "[a](https://a.example/x_(y)) <https://b.example> https://c.example/d?e=f&g=1. [m](mailto:a@b.example \"title\") [rel](/api/delete) [](https://e.example)",
    "references": "See [the docs][d], [d] and [Other Name].\n\nMore [x][Other   name].\n\n- in a list [d]\n\n[d]: https://d.example 'T'\n\nText\n\n[other name]: <https://o.example>\n[d]: https://second.example\n",
    "reference with a title below": "Before\n\n[a]: https://a.example\n'a title\nover lines'\n\n[a] and [b]\n\n[b]: https://b.example\n'not closed\n\nend",
    "images": "![A cat](https://x.example/cat.png) and [![badge](https://x.example/b.svg)](https://x.example) ![](https://x.example/none.png) ![half](",
    "quotes": "> a\n> b\nlazy\n\n> > deeper\n>\n> - list\n> - ```sh\n>   ls | wc -l\n>   ```\n\nout",
    "rules": "a\n\n---\n\nb\n***\nc\n\n- - -\n\n_____\nd",
    "breaks": "one  \ntwo\\\nthree\nfour<br>five<br/>six <b>seven</b> H<sub>2</sub>O x<sup>2</sup> <kbd>Ctrl</kbd> <sub>open",
    "windows": "# One\r\n\r\n- a\r\n- b\r\n\r\n```\r\ncode\r\n```\r\nend\rold",
    "inline maths": "Euler: $e^{i\\pi} + 1 = 0$, and \\(a_1 + b_1\\), $$x^2$$ inside, \\[ y \\] too. **bold $z$** $x$-axis, $n$th.",
    "display maths": "Then\n$$\n\\int_0^1 x\\,dx = \\frac{1}{2}\n$$\nand\n\n\\[\n\\begin{pmatrix} a & b \\\\ c & d \\end{pmatrix}\n\\]\n\n1. In a list:\n   $$a * b * c$$\n2. \\[\n   x_1\n   \\]\n\n$$ one line $$\n",
    "money": "It costs $5 and $6, or US$7; $8-$9, from $10 to 11$. $5, $6. Escaped \\$x\\$ and `$code$` and $`c`$ and $ 5 $.",
    "open maths": "Text\n\n$$\nx + y\n\nnot maths $$ here\n\n\\[ never closed\n\n\\( also not\n\nend $",
    "kinds of maths": (
        "$$\\boxed{x} \\cancel{y} \\color{red}{z} \\colorbox{yellow}{a} \\fcolorbox{red}{white}{b} \\rule{1em}{1ex} \\sqrt[3]{2} \\tag{1}$$\n\n"
        "$$\\overbrace{a+b}^{n} \\xrightarrow{f} \\widehat{abc} \\lim_{x \\to 0} \\begin{cases} 1 & x > 0 \\\\ 0 & \\text{else} \\end{cases}$$\n\n"
        "$\\mathbb{R}, \\mathcal{L}, \\mathfrak{g}, \\mathscr{F}, \\mathsf{S}, \\mathtt{t}, \\phase{-78} \\angl{n} \\pmb{p} \\underline{u} \\overline{v} \\tiny t \\Huge H$"
    ),
    "bad maths": "$\\frac{1}$ and $$\\nosuchcommand{x}$$ then $\\begin{matrix} a$ fine",
    "scripts": "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 hello\n\n- \u05e9\u05dc\u05d5\u05dd\n- world\n\n\u4f60\u597d**\u4e16\u754c**\u3002\n\n| \u0627\u0633\u0645 | b |\n|---|---|\n| \u0642\u064a\u0645\u0629 | \U0001f469\u200d\U0001f4bb |\n",
    "entities": "&lt;script&gt; &amp; &copy; &#x41; &nosuch; \\* \\_ \\` \\# a\\b",
    "numbers": "42. is the answer\n\n1) one\n2) two\n\n7\n\n-1 is negative\n\n+ \n\n*\n",
    "spaces": "\n\n   \n  text with   spaces  \n\n\n\n\ttab\n\n \n",
    "ordinary": (
        "Sure! Here's how to **sum** a list:\n\n```python\ndef total(xs: list[int]) -> int:\n    \"\"\"Add them up.\"\"\"\n    return sum(xs)\n```\n\n"
        "### How it works\n\n1. `sum` takes *any iterable*.\n2. It starts at `0`:\n   - integers stay integers\n   - floats: see [the docs](https://docs.python.org/3/)\n\n"
        "The mean is $\\bar{x} = \\frac{1}{n}\\sum_i x_i$.\n\n| Input | Output |\n|---|---:|\n| `[]` | 0 |\n| `[1, 2]` | 3 |\n\n> **Note:** it is $O(n)$.\n\nAnything else?"
    ),
}  # fmt: skip

# Where any of these did something, `alert` would be called, a request made, or an element of these kinds stand in the page.
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "<svg onload=alert(1)><script>alert(1)</script></svg>",
    "<math><mtext><table><mglyph><style><!--</style><img title=\"--&gt;&lt;img src=1 onerror=alert(1)&gt;\">",
    "<iframe src=javascript:alert(1)></iframe><iframe srcdoc='<script>parent.alert(1)</script>'></iframe>",
    "<style>*{background:url(https://evil.example/s)}</style><link rel=stylesheet href=https://evil.example/l>",
    "<form action=https://evil.example/f><input name=x autofocus onfocus=alert(1)><button>go</button></form>",
    "<meta http-equiv=refresh content='0;url=https://evil.example/m'><base href=https://evil.example/>",
    "<object data=https://evil.example/o></object><embed src=https://evil.example/e><video src=https://evil.example/v autoplay></video>",
    "<details open ontoggle=alert(1)>x</details><body onload=alert(1)><marquee onstart=alert(1)>x</marquee>",
    "[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [c](java&#115;cript:alert(1)) [d](javascript&colon;alert(1)) [e](\x01javascript:alert(1))",
    "[a](data:text/html,<script>alert(1)</script>) [b](vbscript:alert(1)) [c](file:///etc/passwd) [d](//evil.example) [e](/api/delete) [f](#x) [g](blob:x)",
    "<javascript:alert(1)> <https://evil.example/\"onmouseover=alert(1)> [x](https://evil.example/\"onmouseover=\"alert(1))",
    "[x]: javascript:alert(1)\n\n[x] [x][]\n\n[y]: https://evil.example/'\"><img/src/onerror=alert(1)>\n\n[y]",
    "![x](https://evil.example/pixel.png) ![x](data:image/svg+xml,<svg/onload=alert(1)>) ![x](javascript:alert(1))",
    "![x\"onerror=\"alert(1)](https://evil.example/a.png) ![a](https://evil.example/x.png \"t\\\" onload=alert(1)\")",
    "[<img src=x onerror=alert(1)>](https://evil.example \"<script>alert(1)</script>\")",
    "```\"><img src=x onerror=alert(1)>\n<script>alert(1)</script>\n```",
    "```html\n<img src=x onerror=alert(1)>\n<script>alert(1)</script>\n```",
    "```__proto__\nx\n```\n\n```constructor\ny\n```\n\n```toString\nz\n```",
    "`<img src=x onerror=alert(1)>` and ``<script>alert(1)</script>``",
    "| <img src=x onerror=alert(1)> | b |\n|---|---|\n| <script>alert(1)</script> | <br onclick=alert(1)> |",
    "$\\href{javascript:alert(1)}{x}$ $\\url{javascript:alert(1)}$ $\\includegraphics{https://evil.example/i.png}$ $\\htmlData{x=y}{z}$",
    "$\\htmlStyle{background:url(https://evil.example/k)}{x}$ $\\htmlId{location}{x}$ $\\text{<img src=x onerror=alert(1)>}$",
    "$\\def\\a{\\a\\a}\\a$ $\\rule{100000em}{100000em}$ $$\\unicode{x3c}script$$",
    "$<img src=x onerror=alert(1)>$ \\(<script>alert(1)</script>\\)\n\n$$\n</span><img src=x onerror=alert(1)>\n$$",
    "<a id=location name=cookie href=x>x</a><form name=createElement><input name=getElementById></form><img name=body>",
    "<noscript><p title=\"</noscript><img src=x onerror=alert(1)>\"></noscript><template><img src=x onerror=alert(1)></template>",
    "<svg></p><style><a id=\"</style><img src=1 onerror=alert(1)>\"></svg>",
    "<form><math><mtext></form><form><mglyph><style></math><img src onerror=alert(1)></style></mglyph></form>",
    "<p style=\"background:url(https://evil.example/p)\">x</p><div style=position:fixed;inset:0>cover</div>",
    "<br><sub onclick=alert(1)>x</sub><kbd\n onmouseover=alert(1)>y</kbd><sup/onload=alert(1)>z",
    "&lt;img src=x onerror=alert(1)&gt; &#60;script&#62;alert(1)&#60;/script&#62;",
    "\\<img src=x onerror=alert(1)> <\x00img src=x onerror=alert(1)> <IMG\tSRC=x\nONERROR=alert(1)>",
    "<a href=https://evil.example ping=https://evil.example/ping target=_self onclick=alert(1)>x</a>",
]  # fmt: skip
