"""Tests of the page in a browser: links, following, figures, search, keyboard, speed.

    make page && make && python3 dev/test/page_test.py [NAME ...]

With chromium and chromedriver (Debian: chromium, chromium-driver), and pip install selenium
axe-playwright-python markdown pygments latex2mathml. Of axe-playwright-python only the file
axe.min.js is used. NAME: only the tests whose names contain it. Exit status 1 if one fails, or if
something is missing: nothing is skipped.
"""
import functools
import http.server
import importlib.util
import json
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from html import unescape

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "dev"))
import experiments  # noqa: E402
import page  # noqa: E402

PAGE = ROOT / page.OUT
URL = PAGE.as_uri()
SOURCES = {name: (ROOT / name).read_text()
           for name in ("train_gpt2_mla.c", "doc/writeup.md", "doc/modify.md")}

# What the scripts below share: whether an element stands in the visible part of its pane; some
# frames' time; a link followed to its end.
SEEN = """
const seen = (e) => { const pane = e.closest('.pane').getBoundingClientRect();
  const r = e.getBoundingClientRect();
  return r.height > 0 && r.top >= pane.top - 1 && r.top < pane.bottom; };
const frames = async (n) => {
  for (; n; n--) await new Promise((go) => requestAnimationFrame(go)); };
const go = async (link) => {
  const moves = link.hash !== location.hash;
  const there = new Promise((done) => addEventListener('hashchange', done, { once: true }));
  link.click();
  if (moves) await there; };
"""


def missing(what):
    sys.exit(f"error: missing for the page's tests: {what}")


def browser(width=1440, height=900):
    """A browser of that size, without animated scrolling."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser",
                                                    "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        missing("chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage",
                     "--force-prefers-reduced-motion"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    d = webdriver.Chrome(options=options, service=Service(driver))
    d.set_script_timeout(120)
    resize(d, width, height)
    return d


def resize(d, width, height):
    d.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                      {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False})


def media(d, **features):
    kind = features.pop("media", "")
    d.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": kind, "features": [
        {"name": name.replace("_", "-"), "value": value} for name, value in features.items()]})


def visit(d, anchor="", url=URL):
    """Loads the page anew, also where only the anchor differs."""
    d.get("about:blank")
    d.get(url + anchor)
    run(d, "await frames(3);")


def run(d, script, *arguments):
    """What an async function with this body returns in the page."""
    answer = d.execute_async_script(
        f"const done = arguments[arguments.length - 1], given = [...arguments].slice(0, -1);{SEEN}"
        f"(async () => {{ {script} }})().then((value) => done([value, null]),"
        " (error) => done([null, String(error.stack)]));", *arguments)
    assert answer[1] is None, answer[1]
    return answer[0]


def same(found, expected, what):
    assert found == expected, f"{what}: found {found!r}, expected {expected!r}"


# --- Without a browser: the numbers of equations

def planted(name, old, new, expected):
    """Puts a mistake into one of the sources; the check must say `expected`."""
    assert old in SOURCES[name], f"{name} has no {old!r} to plant a mistake at"
    files = {**SOURCES, name: SOURCES[name].replace(old, new, 1)}
    try:
        code = page.Code(files["train_gpt2_mla.c"])
        said = page.check(code, page.Texts(files["doc/writeup.md"], files["doc/modify.md"]))
    except page.Forms as error:
        said = [str(error)]
    assert any(expected in line for line in said), f"{new!r}: expected {expected!r}, found {said}"


def test_check_finds_mistakes(d):
    code, text = "train_gpt2_mla.c", "doc/writeup.md"
    planted(code, "(24)", "(74)", "cites (74), which no equation of the writeup has")
    planted(code, "all layers together (24)", "all layers together",
            "chapter 9 does not cite (24)")
    planted(text, r"\tag{24}", "", "no equation is (24)")
    planted(text, r"\tag{23}", r"\tag{22}", "equation (22) is there more than once")
    planted("doc/modify.md", r"\tag{q2}", r"\tag{25}", "equation (25) is there more than once")
    planted(text, "\n## 3 ", "\n## 2 ", "section 2 of the writeup is there more than once")
    planted(code, "all layers together (24)", "(23f to 23a)", "cites (23f to 23a)")
    planted(text, r"\tag{31}", r"\tag{32}", "equation (32) is missing")
    planted(text, "| (31), (31a)", "| (24), (31), (31a)", "dev/convert.py: does not cite (24)")
    planted(text, "| (24) floats", "| floats", "equation (24) is missing")
    planted(text, "| 9 The cache |", "| 49 The cache |", "the program has no chapter 49")
    planted(text, "| section 14 |", "| section 44 |", "there is no section 44")
    planted(text, "head, (9).", "head, (99).", "cites (99), which no equation has")
    planted("doc/modify.md", "still (23d)", "still (q9)", "cites (q9), which no equation has")
    planted(text, "| in the program | here |", "| program | here |", "a table")
    assert "banners" in str(raised(lambda: page.Code("int main(void) {\n}\n")))


def raised(call):
    try:
        call()
    except page.Forms as error:
        return error
    raise AssertionError("no error was raised")


def test_formulas_that_are_not_understood(d):
    assert "formula not understood" in str(raised(lambda: page.mathml(r"x \fractoin y")))


def test_errors_are_lines(d):
    """What is missing or odd is named in lines that begin with error:, and nothing is written."""
    writeup = SOURCES["doc/writeup.md"].encode()
    odd = [("train_gpt2_mla.c", None, "train_gpt2_mla.c"),
           ("doc/figures/mha.svg", None, "doc/figures/mha.svg"),
           ("doc/modify.md", b"\xff", "doc/modify.md: expected UTF-8"),
           ("doc/writeup.md", writeup.replace(b"is 0, $dW_Q", b"is 0, $ dW_Q"),
            "doc/writeup.md: expected the other $ of a formula"),
           ("dev/results/rank.csv", b"row,seed\nmha,1\n", "dev/results/rank.csv: no table of runs"),
           ("dev/results/rank.csv", b"", "dev/results/rank.csv: expected a table of runs"),
           ("dev/results/rank.csv", b"row,seed,val_loss,parameters,cache,learning_rate\n"
            b"mha,1,nan,1,1,1\n", "not finite"),
           ("doc/page", b"a file in its place", "doc/page")]
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in ("dev/page", "dev/results", "doc/figures"):
            shutil.copytree(ROOT / name, copy / name)
        for name in (*SOURCES, "dev/page.py", "dev/convert.py"):
            shutil.copy(ROOT / name, copy / name)

        def errors(*options):
            made = subprocess.run([sys.executable, *options, copy / "dev/page.py"],
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            assert made.returncode == 1 and made.stderr, made
            assert all(line.startswith("error: ") for line in made.stderr.splitlines()), made.stderr
            assert not (copy / page.OUT).is_file(), "a page in spite of an error"
            return made.stderr
        for name, instead, expected in odd:
            path = copy / name
            if instead is None:
                path.unlink()
            else:
                path.write_bytes(instead)
            assert expected in errors(), name
            if (ROOT / name).is_file():
                shutil.copy(ROOT / name, path)
        assert "package markdown is missing" in errors("-I", "-S")


# --- Quiet: the console, the network, the size

def test_size(d):
    assert PAGE.stat().st_size <= 3e6, f"{PAGE.stat().st_size} bytes, expected at most 3 MB"


def test_static_host(d):
    """On a static host, too, the page asks for itself alone."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        asked = []

        def log_message(self, *arguments):
            self.asked.append(self.path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(
        Handler, directory=str(PAGE.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    visit(d, "#eq-25", f"http://127.0.0.1:{server.server_port}/index.html")
    run(d, """
      for (const button of document.querySelectorAll('button')) button.click();
      for (const select of document.querySelectorAll('select'))
        for (const option of select.options) {
          select.value = option.value; select.dispatchEvent(new Event('change')); }
      await frames(5);""")
    server.shutdown()
    same(Handler.asked, ["/index.html"], "what a static host was asked for")


# --- Links in both directions

def test_equations_from_the_code(d):
    visit(d)
    found = run(d, """
      const wrong = [], links = [...document.querySelectorAll('.l .cite')];
      for (const link of links) {
        link.click();
        const box = link.closest('.l').nextElementSibling;
        const equation = document.getElementById(link.getAttribute('href').slice(1));
        const parts = box?.querySelector('.parts');
        if (!parts || !equation.querySelector('summary, .number').textContent.includes(
            `(${link.textContent})`) || parts.textContent !== equation.querySelector('.parts')
            .textContent || parts.getBoundingClientRect().height < 10) wrong.push(link.href);
        link.click();
        if (link.closest('.l').nextElementSibling?.matches('.box')) wrong.push(link.href);
      }
      return [links.map((link) => link.textContent), wrong];""")
    code = page.Code(SOURCES["train_gpt2_mla.c"])
    same(found[1], [], "citations that do not open their equation")
    expected = [n for comment in code.comment for m in page.CITED.finditer(comment)
                for n in re.findall(page.NUMBER, m[1])]
    same(found[0], expected, "citations in the code")


def test_functions_of_an_equation(d):
    visit(d)
    found = run(d, """
      const answer = {}, wrong = [];
      document.getElementById('follow').checked = false;
      for (const equation of document.querySelectorAll('.eq[id]')) {
        const list = equation.querySelector('details');
        list.querySelector('summary').click();
        const links = [...list.querySelectorAll('a')].slice(0, -1);
        answer[equation.id.slice(3)] = links.map((link) => link.textContent);
        for (const link of links) {
          await go(link);
          const target = document.getElementById(link.hash.slice(1));
          if (!seen(target)) wrong.push(equation.id + ' ' + link.hash);
        }
      }
      return [answer, wrong];""")
    same(found[1], [], "functions of an equation that do not come into view")
    texts = page.Texts(SOURCES["doc/writeup.md"], SOURCES["doc/modify.md"])
    same(sorted(found[0]), sorted(texts.numbers + texts.others), "numbered equations")
    code = page.Code(SOURCES["train_gpt2_mla.c"])
    cited = {n: set() for n in found[0]}
    for line, n in page.citations(code, texts):
        if chapter := code.chapter_at(line):
            cited[n].add(code.function_at(line) or f"chapter {chapter}, line {line}")
    same({n: set(names) for n, names in found[0].items()}, cited, "functions of equations")
    assert "cache_floats" in cited["24"] and "absorbed_query" in cited["25"], cited


def test_functions_from_the_text(d):
    visit(d)
    found = run(d, """
      const wrong = [], links = [...document.querySelectorAll('#text a[id^="m-"]')];
      document.getElementById('follow').checked = false;
      for (const link of links) {
        await go(link);
        const target = document.getElementById(link.hash.slice(1));
        if (target?.textContent !== link.textContent || !seen(target)) wrong.push(link.id);
        target.click();
        const box = target.closest('.l').nextElementSibling;
        const back = [...box.querySelectorAll('a')].find((a) => a.hash === '#' + link.id);
        if (back) await go(back);
        if (!back || !seen(link)) wrong.push('back: ' + link.id);
        box.remove();
      }
      return [links.map((link) => link.textContent), wrong];""")
    same(found[1], [], "functions in the text whose link fails there or back")
    code = page.Code(SOURCES["train_gpt2_mla.c"])
    texts = [re.sub(r"\$\$.*?\$\$|^ {4,}.*$", "", SOURCES[f"doc/{name}.md"], flags=re.S | re.M)
             if name == "writeup" else SOURCES[f"doc/{name}.md"] for name in ("writeup", "modify")]
    named = [n for text in texts for n in re.findall(r"`(\w+)`", text)
             if n in code.functions]
    same(sorted(found[0]), sorted(named), "functions that the text names")


def test_every_link_has_a_target(d):
    visit(d)
    same(run(d, """return [...document.querySelectorAll('a[href^="#"]')].map((a) => a.hash.slice(1))
      .filter((id) => !document.getElementById(id));"""), [], "links without a target")
    same(run(d, """const ids = [...document.querySelectorAll('[id]')].map((e) => e.id);
      return ids.filter((id, k) => ids.indexOf(id) !== k);"""), [], "ids that are there twice")
    source = SOURCES["train_gpt2_mla.c"].splitlines()
    for name, (first, _) in page.Code(SOURCES["train_gpt2_mla.c"]).functions.items():
        assert name in source[first - 1], (name, first)
        same(run(d, "return document.getElementById(given[0])?.closest('.l').id", f"f-{name}"),
             f"L{first}", f"the place of {name}")


def test_addresses(d):
    for anchor in ("#eq-25", "#eq-q1", "#f-absorbed_query", "#L1000", "#section-9", "#chapter-13"):
        visit(d, anchor)
        assert run(d, "return seen(document.querySelector(location.hash))"), anchor
    visit(d, "#%")  # no address, and no error
    place = """await frames(9);
      return ['text', 'code'].map((id) => document.getElementById(id).scrollTop)"""
    before = run(d, "document.getElementById('text').scrollTop = 9000;" + place)
    run(d, "await go(document.querySelector('#text section:nth-of-type(2) a.cite'))")
    d.back()
    same(run(d, place), before, "where Back comes to")
    run(d, """const line = document.querySelector('#L12'), r = line.getBoundingClientRect();
      line.dispatchEvent(new MouseEvent('click', { bubbles: true, clientX: r.left + 20,
        clientY: r.top + 5 })); await frames(2);""")
    assert d.current_url.endswith("#L12"), d.current_url


# --- Following

def test_following(d):
    visit(d)
    pairs = run(d, "return JSON.parse(document.getElementById('data').textContent).follow")
    assert len(pairs) > 40, pairs
    script = """
      const [from, to, name] = given, pane = document.getElementById(name);
      const place = document.getElementById(from), other = document.getElementById(to);
      pane.dispatchEvent(new WheelEvent('wheel', { bubbles: true }));
      const way = () => place.getBoundingClientRect().top - pane.getBoundingClientRect().top
        - pane.clientHeight / 3 + 5;
      const before = pane.scrollTop, done = new Promise((ready) =>
        pane.addEventListener('scrollend', ready, { once: true }));
      pane.scrollTop += way();
      if (pane.scrollTop !== before) await done;
      return seen(other);"""
    for anchor, line in pairs:
        assert run(d, script, anchor, f"L{line}", "text"), f"{anchor}: line {line} does not follow"
    code = page.Code(SOURCES["train_gpt2_mla.c"])
    pairs = [pair for pair in pairs if not pair[0].startswith("m-")]
    for anchor, line in sorted(pairs, key=lambda pair: pair[1]):
        beside = [a for a, at in pairs if at == line]
        assert any(run(d, script, f"L{line}", a, "code") for a in beside), (line, beside)
    banners = {c.number: c.banner for c in code.chapters}
    for number in {code.chapter_at(line) for _, line in pairs}:  # a chapter, the other way round
        near = [a for a, line in pairs if code.chapter_at(line) == number]
        assert any(run(d, script, f"L{banners[number]}", a, "code") for a in near), number
    run(d, "document.getElementById('follow').click()")
    before = run(d, "return document.getElementById('code').scrollTop")
    run(d, script, "eq-2", "L1", "text")
    after = run(d, "return document.getElementById('code').scrollTop")
    same(after, before, "where the code is, not following")


def test_following_by_wheel(d):
    visit(d)
    text = d.find_element(By.ID, "text")
    ActionChains(d).scroll_from_origin(ScrollOrigin.from_element(text), 0, 15000).perform()
    time.sleep(.5)
    assert run(d, "return document.getElementById('code').scrollTop") > 1000, "the code stayed"


def test_part_one(d):
    visit(d)
    shown = """return [...document.querySelectorAll('#code section, #text section')]
      .filter((s) => s.offsetHeight).map((s) => s.id || s.getAttribute('aria-labelledby'))"""
    run(d, "document.getElementById('part-one').click()")
    found = run(d, shown)
    same([s for s in found if s.startswith("chapter")], [f"chapter-{n}" for n in range(9)],
         "chapters of Part I, and what comes before them")
    assert "section-9" in found and not {"section-10", "section-14", "modify"} & set(found), found
    run(d, "location.hash = '#eq-25'; await frames(3)")
    assert run(d, "return seen(document.getElementById('eq-25'))"), "a link out of Part I"
    assert "chapter-17" in run(d, shown)


# --- Figures

SLIDE = """
const slide = (values) => {
  for (const [name, value] of Object.entries(values)) {
    const input = document.querySelector(`#living-cache [name="${name}"]`);
    input.value = value;
    input.dispatchEvent(new Event(input.tagName === 'SELECT' ? 'change' : 'input'));
  } };
"""


def test_sliders_beside_the_program(d):
    program = ROOT / "train_gpt2_mla"
    if not program.is_file():
        missing("the program (make)")
    draw, done = random.Random(1), set()
    positions = {"mha": ["learned", "rope", "decoupled"], "gqa": ["learned", "rope"],
                 "mqa": ["learned", "rope"], "mla": ["learned", "decoupled"]}
    visit(d)
    with tempfile.TemporaryDirectory() as folder:
        while len(done) < 20:
            kind = draw.choice(["mha", "gqa", "mqa", "mla", "mla", "mla"])
            NH, HS = draw.choice([2, 4, 6, 8, 12]), draw.choice([8, 10, 16, 24])
            L = draw.randint(1, 4)
            m = {"kind": kind, "position": draw.choice(positions[kind]),
                 "cache": draw.choice(["latents", "keys and values"]), "L": L, "NH": NH, "HS": HS,
                 "NKV": draw.choice([n for n in range(1, NH + 1) if NH % n == 0]),
                 "R": draw.randint(1, NH * HS), "RD": draw.choice(range(2, HS, 2))}
            if json.dumps(m) in done:
                continue
            done.add(json.dumps(m))
            options = (f"--attention {kind} --position {m['position']} --layers {L} --heads {NH} "
                       f"--channels {NH * HS} --seq-len 8 --batch-size 1 --steps 0")
            options += f" --kv-heads {m['NKV']}" if kind in ("gqa", "mla") else ""
            options += f" --kv-rank {m['R']}" if kind == "mla" else ""
            options += f" --rope-dim {m['RD']}" if m["position"] == "decoupled" else ""
            save = f"{folder}/{len(done)}.safetensors"
            cache = "absorbed" if kind == "mla" and m["cache"] == "latents" else "full"
            subprocess.run([program, *options.split(), "--save", save], check=True, timeout=60,
                           stdout=subprocess.DEVNULL, cwd=folder)
            said = subprocess.run([program, "--generate", "1", "--cache", cache, "--load", save],
                                  check=True, timeout=60, stderr=subprocess.PIPE, text=True,
                                  stdout=subprocess.DEVNULL, cwd=folder, errors="replace").stderr
            expected = re.search(r"KV cache (\d+) floats per token", said)[1]
            found, bar = run(d, f"""{SLIDE}
              slide(given[0]);
              return [document.getElementById('floats').textContent,
                document.querySelector('.bars .chosen').textContent];""", m)
            same(found.replace(",", ""), expected, f"floats per token of {m}")
            assert bar.endswith(f": {found}"), f"{bar}, for {found} floats of {m}"
    same(run(d, f"{SLIDE} slide({{ kind: 'mla', NH: 16, NKV: 16, R: 64 }}); slide({{ NH: 1 }});"
             "slide({ NH: 16 }); return ['NKV', 'R'].map((name) => document.querySelector("
             "`[name=${name}]`).value)"), ["16", "64"], "NKV and R after other numbers of heads")
    said = run(d, f"""{SLIDE}
      slide({{ kind: 'mha', position: 'rope', L: 24, NH: 16, HS: 64, T: 10 }});
      return document.querySelector('.answer').textContent;""")
    assert "49,152 floats" in said and "201.3\xa0MB for a text of 1,024 tokens" in said, said


def test_absorption_beside_the_writeup(d):
    visit(d)
    table = re.search(r"^\| full \|.*\n\| latent \|.*\n\| absorbed \|.*$",
                      SOURCES["doc/writeup.md"], re.M)[0]
    said = run(d, """
      const figure = document.getElementById('living-absorption'), said = {};
      const next = [...figure.querySelectorAll('button')].at(-1);
      for (let k = 0; k < 10; k++) {
        const way = figure.querySelector('input:checked').value;
        said[way] = [...(said[way] || []), [figure.querySelector('#costs').textContent,
          figure.querySelector('[role=img]').ariaLabel]];
        next.click();
      }
      return said;""")
    same({way: len(steps) for way, steps in said.items()},
         {"full": 3, "latent": 3, "absorbed": 4}, "steps")
    for row in table.splitlines():
        way = row.split("|")[1].strip()
        expected = re.findall(r"= ([\d,]+)", row)
        found = re.findall(r"([\d,]+) (?:multiply|once|floats)", said[way][0][0])
        same([n for n in found if n != "0"], expected, f"what {way} costs")
    meets = ["q, 32, meets k_j, 32, which gives score, 1",
             "p_j, 1, meets v_j, 32, which gives out, 32"]
    same({way: [label for _, label in steps] for way, steps in said.items()}, {
        "full": ["W_UKV, (48, 341), meets c, 341, which gives [k_nope; v], 48", *meets],
        "latent": ["W_UKV, (48, 341), meets c_j, 341, which gives [k_nope,j; v_j], 48", *meets],
        "absorbed": ["W_UK', (341, 16), meets q_nope, 16, which gives q̃, 341",
                     "[q̃; q_rope], 357, meets [c_j; k_rope,j], 357, which gives score, 1",
                     "p_j, 1, meets c_j, 341, which gives õ, 341",
                     "W_UV, (32, 341), meets õ, 341, which gives out, 32"]}, "what meets what")
    # The example at the end of the writeup's section on costs.
    said = run(d, f"""{SLIDE}
      slide({{ NKV: 4, R: 64 }});
      return ['full', 'absorbed'].map((way) => {{
        document.querySelector(`[value=${{way}}]`).click();
        return document.getElementById('costs').textContent; }});""")
    for words, *numbers in zip(said, ("1,024", "2,304"), ("208", "80")):
        same(re.findall(r"([\d,]+) (?:multiply|floats)", words), numbers, words)


def test_results(d):
    visit(d)
    for name in page.results():
        found = run(d, """
          const figure = document.getElementById('living-results');
          const select = figure.querySelector('select');
          select.value = given[0];
          select.dispatchEvent(new Event('change'));
          return [...figure.querySelectorAll('input')].map((point) => {
            point.focus();
            return [point.ariaLabel, point.getBoundingClientRect().left,
              figure.querySelector('code').textContent]; });""", name)
        axis = run(d, "return [...document.querySelectorAll('.axis span')].map((e) => e.innerText)")
        entries = experiments.read_results(name)
        same(sorted(label for label, *_ in found),
             sorted(f"{e['row']}, seed {e['seed']}: loss {float(e['val_loss']):.4f}"
                    for e in entries), name)
        points = sorted((left, float(label.split()[-1])) for label, left, _ in found)
        (first, low), (last, high) = points[0], points[-1]
        assert all(abs(float(a) - b) < .001 for a, b in zip(axis, (low, high))), (name, axis)
        for left, loss in points:
            expected = first + (last - first) * (loss - low) / (high - low)
            assert abs(left - expected) < 1, f"{name}: loss {loss} at {left}, expected {expected}"
        rows = [row for row, *_ in experiments.EXPERIMENTS[name]] + [*experiments.REWRITTEN]
        programs = {e["row"]: e["program"] for e in entries}
        for label, _, command in found:
            row, seed, cuda = re.fullmatch(
                rf'python3 dev/experiments.py {name} --only "(.+)" --seeds (\d+)( --device cuda)?',
                command).groups()
            assert row in rows and label.startswith(row) and f", seed {seed}:" in label, command
            same(bool(cuda), programs[row] == "PyTorch", command)
    before = d.find_element(By.CSS_SELECTOR, "#living-results code").text
    d.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert d.find_element(By.CSS_SELECTOR, "#living-results code").text != before, "arrow keys"


# --- Search, symbols, keyboard

def test_search(d):
    visit(d)
    query = d.find_element(By.ID, "query")
    query.send_keys("log-sum-exp")
    assert "1 in the text, 0 in the code" in d.find_element(By.ID, "count").text
    query.send_keys(Keys.ENTER)
    assert run(d, "return seen(document.activeElement) && /log-sum-exp/.test("
                  "document.activeElement.textContent)"), "the first result is not shown"
    query.clear()
    query.send_keys("absorbed_query static")
    down = run(d, "return [...document.querySelectorAll('#results li')]"
                  ".findIndex((li) => li.querySelector('code')) + 1")
    ActionChains(d).send_keys(*[Keys.TAB] * down).perform()
    link = d.switch_to.active_element
    assert down and "static void absorbed_query" in link.text, link.text
    href = link.get_attribute("href")
    ActionChains(d).send_keys(Keys.ENTER).perform()
    same(d.current_url, href, "the address of a result")
    assert run(d, "return seen(document.querySelector(location.hash))"), href
    query.clear()
    query.send_keys("no such words here")
    assert d.find_element(By.ID, "count").text.startswith("0 in the text, 0 in the code")
    query.send_keys(Keys.ESCAPE)
    assert not d.find_element(By.ID, "results").is_displayed()


def test_symbols(d):
    visit(d, "#section-9")
    tip = d.find_element(By.ID, "tip")

    def at(script):
        """What is said where the script's rectangle has its middle."""
        x, y = run(d, f"const r = await (async () => {{ {script} }})();"
                      "return [Math.round(r.left + r.width / 2), Math.round(r.top + r.height / 2)]")
        d.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})
        run(d, "await frames(3)")
        return tip.text if tip.is_displayed() else ""
    word = """const walk = document.createTreeWalker(document.querySelector('%s'), 4);
      for (let n = walk.nextNode(); n; n = walk.nextNode()) {
        const at = n.data.search(/%s/);
        if (at < 0 || n.parentElement.closest('math, .number, .living')) continue;
        n.parentElement.scrollIntoView({ block: 'center' });
        await frames(3);
        const r = new Range(); r.setStart(n, at); r.setEnd(n, at + %d);
        return r.getClientRects()[0]; }"""
    assert "key/value heads" in at(word % ("#text", r"\bNKV\b", 3))
    assert "rope_dim" in at(word % ("#chapter-5", r"\bRD\b", 2))
    same(at(word % ("#text", r"\bC program", 1)), "", "the C of `the C program`")
    math = """const e = [...document.querySelectorAll('#eq-25 msub, #eq-25 msubsup')]
      .find((e) => e.textContent.startsWith('%s'));
      e.scrollIntoView({ block: 'center' }); await frames(3);
      return e.firstElementChild.getBoundingClientRect();"""
    assert at(math % "WUK").startswith("(NOPE, R)"), "W_UK"
    assert at(math % "q~").startswith("R: an absorbed query"), "the absorbed query"


def test_keyboard(d):
    visit(d)
    press = lambda *keys: ActionChains(d).send_keys(*keys).perform()  # noqa: E731
    where = lambda: run(d, "const e = document.activeElement;"  # noqa: E731
                           "return e.id || e.textContent.trim()")
    seen = []
    for _ in range(10):
        press(Keys.TAB)
        seen.append(where())
    same(seen, ["To the text", "To the code", "Contents", "Notation", "query", "follow", "part-one",
                "text", *seen[8:]], "what Tab comes to")
    assert run(d, "return document.activeElement.closest('#text') !== null")
    for name in ("contents", "notation"):
        run(d, f"document.querySelector('[popovertarget={name}]').focus()")
        press(Keys.ENTER)
        assert d.find_element(By.ID, name).is_displayed(), name
        press(Keys.ESCAPE)
        assert not d.find_element(By.ID, name).is_displayed(), name
    run(d, "document.querySelector('a.skip[href=\"#code\"]').focus()")
    press(Keys.ENTER)
    same(where(), "code", "the link to the code")
    press(Keys.TAB)
    link = run(d, "return document.activeElement.className")
    same(link, "cite", "the first stop in the code")
    press(Keys.ENTER)
    assert run(d, "return document.activeElement.matches('.box')"), "Enter on a citation"
    press(Keys.ESCAPE)
    assert run(d, "return document.activeElement.matches('.cite')"), "Escape in the box"
    assert not d.find_elements(By.CSS_SELECTOR, ".box"), "a box stays open"
    run(d, "document.querySelector('#eq-25 summary').focus()")
    press(Keys.ENTER, Keys.TAB, Keys.ENTER)
    assert run(d, "await frames(2); return document.activeElement.id === 'f-absorbed_query'")
    run(d, "document.querySelector('[name=L]').focus()")
    press(Keys.ARROW_RIGHT)
    same(d.find_element(By.ID, "floats").text, "3,213", "floats after a step of the layers' slider")


# --- Other readers: a narrow screen, no scripts, print, assistive technology

def test_narrow(d):
    resize(d, 360, 800)
    for anchor in ("", "#eq-19", "#living-absorption", "#f-absorbed_query", "#modify"):
        visit(d, anchor)
        assert run(d, "return document.documentElement.scrollWidth") <= 360, f"{anchor}: too wide"
        assert not anchor or run(d, """const r = document.querySelector(location.hash)
          .getBoundingClientRect(); return r.height > 0 && r.top < innerHeight"""), anchor
    visit(d, "#eq-24")
    code = d.find_element(By.ID, "code")
    assert not code.is_displayed()
    d.find_element(By.ID, "other").click()
    assert code.is_displayed() and not d.find_element(By.ID, "text").is_displayed()
    for width in (360, 1440, 360):
        resize(d, width, 800)
        assert run(d, """await frames(20); const r = document.getElementById('f-cache_floats')
          .getBoundingClientRect(); return r.top > 0 && r.top < innerHeight"""), \
            f"the function beside (24), where the window's width becomes {width}"
    resize(d, 1440, 900)


def test_without_scripts(d):
    d.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    media(d, media="print")  # so that also what is out of sight is laid out
    d.get("about:blank")
    d.get(URL)
    try:
        document = d.execute_cdp_cmd("DOM.getDocument", {"depth": 0})
        html = d.execute_cdp_cmd("DOM.getOuterHTML",
                                 {"nodeId": document["root"]["nodeId"]})["outerHTML"]
        tree = d.execute_cdp_cmd("DOMSnapshot.captureSnapshot", {"computedStyles": []})
    finally:
        d.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
        media(d)
    assert '<html lang="en" class="js"' not in html and "<option" not in html, "scripts have run"
    laid = tree["documents"][0]["layout"]
    drawn = "".join(tree["strings"][i] for i in laid["text"] if i >= 0)
    dense = re.sub(r"\s+", "", drawn)
    for number, line in enumerate(SOURCES["train_gpt2_mla.c"].splitlines(), 1):
        words = f"{number}" + re.sub(r"\s+", "", line)
        assert words in dense, f"not there without scripts: {words}"
    article = re.sub(r"<details.*?</details>", "", html[html.index("<article>"):], flags=re.S)
    pieces = [m[2] for m in re.finditer(r"<(p|li|th|td|h\d)\b[^>]*>(.*?)</\1>", article, re.S)
              if not re.search(r"<(math|p|li|ul)", m[2])]
    assert len(pieces) > 500, len(pieces)
    for piece in pieces:
        words = re.sub(r"\s+", "", unescape(re.sub(r"<[^>]+>", "", piece)))
        assert words in dense, f"not there without scripts: {piece}"
    assert html.count("<figure>") == SOURCES["doc/writeup.md"].count("](figures/"), "figures"


def test_print(d):
    visit(d)
    media(d, media="print")
    shown = run(d, """return ['header', '#text', '#code', '#living-cache', '#L1500'].map((s) =>
      document.querySelector(s).getBoundingClientRect().height > 0)""")
    media(d)
    same(shown, [False, True, True, False, True], "header, text, code, figure, line in print")


def test_accessible(d):
    found = importlib.util.find_spec("axe_playwright_python")
    if not found:
        missing("axe.min.js (pip install --no-deps axe-playwright-python)")
    script = (pathlib.Path(found.submodule_search_locations[0]) / "axe.min.js").read_text()
    opened = ("document.querySelector('[popovertarget=contents]').click();"
              "document.querySelector('#chapter-4 .cite').click();"
              "document.querySelector('#eq-1 summary').click();")
    # The whole page, but for contrast; then every rule in several states, of a page with one
    # chapter of code and no formulas: more of either has no other colors, and takes a minute.
    some = "math, #code section:not(#chapter-4) { display: none }"
    states = [(1440, "light", "", "", False), (360, "light", "#chapter-4", some, False),
              (1440, "light", opened, some, True), (1440, "dark", "#eq-24", some, True)]
    for width, scheme, action, hidden, contrast in states:
        resize(d, width, 900)
        media(d, prefers_color_scheme=scheme)
        visit(d, action if action.startswith("#") else "")
        run(d, (action if action == opened else "") + script + "; window.axe = axe;")
        wrong = run(d, """const style = document.createElement('style');
          style.textContent = given[0];
          document.head.append(style);
          const rules = { 'color-contrast': { enabled: given[1] } };
          return (await axe.run({ resultTypes: ['violations'], rules })).violations
            .map((v) => [v.id, v.help, v.nodes.length, v.nodes.slice(0, 3).map((n) =>
              n.html.slice(0, 120) + ' ' + n.failureSummary.slice(0, 200))]);""",
                    hidden, contrast)
        same(wrong, [], f"axe at {width}, {scheme}, {action}")
    media(d)
    resize(d, 1440, 900)


# --- Speed

def test_speed(d):
    first = []
    for _ in range(3):  # the best of three: other work runs beside
        visit(d)
        first.append(run(d, "return performance.getEntriesByName('first-contentful-paint')[0]"
                            ".startTime"))
    print(f"  first text after {min(first):.0f} ms")
    assert min(first) < 1000, f"first text after {first} ms, expected less than 1000"
    # Time of the processor, not of the clock: other work runs beside.
    d.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})

    def used():
        metrics = d.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return next(1000 * m["value"] for m in metrics if m["name"] == "TaskDuration")
    visit(d)
    tasks = []
    for name in ("text", "code"):
        for _ in range(60):
            start = used()
            run(d, """const pane = document.getElementById(given[0]);
              pane.dispatchEvent(new WheelEvent('wheel', { bubbles: true }));
              pane.scrollTop += 400; await frames(2);""", name)
            tasks.append(used() - start)
    d.execute_cdp_cmd("Performance.disable", {})
    print(f"  longest task while scrolling {max(tasks):.0f} ms of the processor")
    assert 0 < max(tasks) <= 100, f"a task of {max(tasks)} ms while scrolling, expected at most 100"


def test_no_request_left(d):
    """Of all that the tests above did, nothing asked for another address."""
    messages = [json.loads(entry["message"])["message"] for entry in d.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages
             if m["method"] == "Network.requestWillBeSent"]
    own = (URL, "data:", "about:", "http://127.0.0.1:")
    same([url for url in asked if not url.startswith(own)], [], "requests that left the page")
    assert any(url.startswith(URL) for url in asked) or len(sys.argv) > 1, "no request was recorded"


def main():
    if not PAGE.is_file():
        missing(f"{page.OUT} (make page)")
    names = [name for name in globals() if name.startswith("test_")
             and (not sys.argv[1:] or any(word in name for word in sys.argv[1:]))]
    failed, start = 0, time.time()
    d = browser()
    try:
        for name in names:
            try:
                globals()[name](d)
                said = [e["message"] for e in d.get_log("browser") if e["level"] == "SEVERE"]
                same(said, [], "errors in the browser's console")
                print(f"ok   {name} ({time.time() - start:.0f}s)", flush=True)
            except Exception:
                failed += 1
                print(f"FAIL {name}\n{traceback.format_exc(limit=-2)}", flush=True)
                media(d)
                resize(d, 1440, 900)
    finally:
        d.quit()
    print(f"{len(names) - failed} passed, {failed} failed")
    sys.exit(bool(failed) or not names)


try:
    from selenium import webdriver
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
    from selenium.webdriver.common.by import By
except ModuleNotFoundError as error:
    missing(f"Python's package {error.name} (pip install selenium)")

if __name__ == "__main__":
    main()
