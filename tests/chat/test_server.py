"""The chat page, in a real browser, and what it refuses."""

import contextlib
import json
import queue
import shutil
import socket
import threading
import urllib.error
import urllib.request

import pytest
import uvicorn
import yaml
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from transformers import GenerationConfig

from firefly_lightning.chat.command import chat
from firefly_lightning.chat.questions import MOST_BYTES, sliders
from firefly_lightning.chat.server import serve
from firefly_lightning.errors import FireflyError
from firefly_lightning.evaluation.rows_in_flight import RowsInFlight
from firefly_lightning.preparation.templates.reader import TEMPLATE_FOLDER
from tests.conftest import ANSWERS
from tests.support.helpers import one_line, raised_line, run

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
OWN = GenerationConfig(max_new_tokens=40, do_sample=True, temperature=0.35, top_p=0.85, repetition_penalty=1.2)
DECODING = {"temperature": 0.35, "top_p": 0.85, "repetition_penalty": 1.2, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def browser():
    """An installed Chromium, else the one that `playwright install chromium` has fetched."""
    installed = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens a page; whatever it asks of other addresses, and any complaint of its code, fails the test."""
    asked, complaints, pages = [], [], []

    def open_it(port, width=1200):
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.on("request", lambda request: asked.append((request.url, f"http://127.0.0.1:{port}/")))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.goto(f"http://127.0.0.1:{port}/")
        expect(page.locator(".example").first).to_be_visible()
        pages.append(page)
        return page

    yield open_it
    for page in pages:
        page.close()
    assert {url for url, own in asked if not url.startswith(own)} == set()
    assert complaints == []


@contextlib.contextmanager
def serving(start):
    """The port where what `start` serves listens, until the end."""
    started, run_server, failures = queue.Queue(), uvicorn.Server.run, []

    def note(server, sockets):
        started.put((server, sockets[0].getsockname()))
        run_server(server, sockets)

    def target():
        try:
            start()
        except BaseException as error:
            failures.append(error)
            started.put((None, (None, None)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.Server, "run", note)
        thread = threading.Thread(target=target, daemon=True)
        thread.start()
        server, (_, port) = started.get(timeout=60)
        try:
            yield port
        finally:
            if server:
                server.should_exit = True
            thread.join(timeout=30)
    assert not failures
    assert not thread.is_alive()


def ask(page, text):
    page.get_by_label("问题").fill(text)
    page.keyboard.press("Enter")


def last(page):
    return page.locator(".answered").last


def test_a_conversation_in_a_browser(fluent_folder, tokenizer, open_page, monkeypatch, tmp_path):
    generated, add = [], RowsInFlight.add

    def record(self, rows):
        generated.append((rows[0].prompt, self.choice))
        add(self, rows)

    monkeypatch.setattr(RowsInFlight, "add", record)
    with serving(lambda: chat(str(fluent_folder), web=True, port=0, device="cpu", seed=0)) as port:
        page = open_page(port)
        expect(page.locator("#model")).to_have_text(fluent_folder.name)
        assert page.locator(".example").count() == len(list(TEMPLATE_FOLDER.glob("*.yaml"))) == 23
        page.screenshot(path=tmp_path / "examples.png")
        page.locator(".example[data-kind=Couplet]").click()
        couplet = yaml.safe_load((TEMPLATE_FOLDER / "Couplet.yaml").read_text("utf-8"))["example"]["input"]
        expect(page.get_by_label("问题")).to_have_value(couplet)

        ask(page, "你好")
        expect(last(page)).to_have_text(ANSWERS["你好"])
        expect(page.locator("#send")).to_be_visible()
        page.locator("#temperature").fill("0")
        page.locator("#max_new_tokens").fill("30")
        page.locator("#repetition_penalty").fill("1")
        ask(page, "hello")
        expect(page.locator(".answered")).to_have_count(2)
        expect(page.locator("#send")).to_be_visible()
        page.locator("#clear").click()
        expect(page.locator(".turn")).to_have_count(0)
        page.locator("#temperature").fill("0.5")
        page.locator("#top_p").fill("0.9")
        ask(page, "春风又绿江南岸")
        expect(last(page)).to_have_text(ANSWERS["春风又绿江南岸"])
        assert_drawn(page, "春秋", tmp_path / "answer.png")

    later = f"<s>你好</s></s>{ANSWERS['你好']}</s>hello</s>"
    questions = ("<s>你好</s></s>", later, "<s>春风又绿江南岸</s></s>")
    assert [ids for ids, _ in generated] == [tokenizer.encode(text) for text in questions]
    names = ("do_sample", "temperature", "top_p", "repetition_penalty", "max_new_tokens")
    published, greedy, drawn = (tuple(getattr(choice, name) for name in names) for _, choice in generated)
    assert published == (True, 0.35, 0.85, 1.2, 200)
    assert (greedy[0], *greedy[3:]) == (False, 1.0, 30)
    assert drawn == (True, 0.5, 0.9, 1.0, 30)


def assert_drawn(page, characters, path):
    """Without a font that has them, each would be the same box."""
    page.screenshot(path=path)
    drawn = []
    for character in characters:
        last(page).locator("div").evaluate("(shown, text) => { shown.textContent = text }", character)
        last(page).locator("div").screenshot(path=path.with_name("character.png"))
        drawn.append(Image.open(path.with_name("character.png")).convert("L").tobytes())
    assert len(set(drawn)) == len(characters), "install a font with Chinese characters"


def test_an_answer_appears_as_it_comes_and_can_be_stopped(open_page):
    told, closed, more = [], threading.Event(), threading.Event()

    def answer(turns, question, config):
        told.append(turns)
        try:
            yield "一"
            more.wait(10)
            yield "二"
            while question == "数":
                threading.Event().wait(0.01)
                yield "三"
        finally:
            closed.set()

    with serving(lambda: serve(answer, OWN, "数数", port=0)) as port:
        page = open_page(port)
        ask(page, "数")
        expect(last(page)).to_have_text("一")
        assert not more.is_set()
        more.set()
        expect(last(page)).to_contain_text("二三")
        page.locator("#stop").click()
        expect(page.locator("#send")).to_be_visible()
        assert closed.wait(10)
        stopped = last(page).inner_text()
        ask(page, "再数")
        expect(last(page)).to_have_text("一二")
    assert told == [[], [("数", stopped)]]


def test_what_fails_is_told_and_what_looks_like_markup_is_text(open_page, capsys):
    markup = "<img src='http://192.0.2.1/x' onerror='document.title = 1'><b>粗</b>"

    def answer(turns, question, config):
        yield markup
        if question == "失败":
            raise RuntimeError("out of memory")

    with serving(lambda: serve(answer, OWN, "失败", port=0)) as port:
        page = open_page(port)
        ask(page, "失败")
        expect(page.locator(".wrong")).to_contain_text("out of memory")
        expect(page.get_by_label("问题")).to_have_value("失败")
        ask(page, markup)
        expect(last(page)).to_have_text(markup)
        assert page.locator("#turns img, #turns b").count() == 0
        assert page.title() == "Firefly 流萤"
    assert "RuntimeError: out of memory" in capsys.readouterr().err


def test_one_answer_is_generated_at_a_time_and_none_for_nobody():
    running, most, left = [], [], threading.Event()

    def answer(turns, question, config):
        running.append(question)
        most.append(len(running))
        try:
            yield "一"
            left.wait(10)
            yield "二"
        finally:
            running.remove(question)

    with serving(lambda: serve(answer, OWN, "等", port=0)) as port:
        first = post(port, body("甲"))
        assert json.loads(first.readline()) == {"piece": "一"}
        second, replies = threading.Thread(target=lambda: replies.extend(post(port, body("乙")))), []
        second.start()
        second.join(0.2)
        assert replies == []
        first.close()  # the browser is gone
        left.set()
        second.join(10)
    assert [json.loads(reply) for reply in replies] == [{"piece": "一"}, {"piece": "二"}, {"done": True}]
    assert most == [1, 1]
    assert running == []


def test_nothing_listens_beyond_loopback_unless_asked(capsys):
    """All of 127.0.0.0/8 is this machine; only what listens on every address answers at 127.0.0.2."""
    with serving(lambda: serve(echo, OWN, "近", port=0)) as port:
        assert connects("127.0.0.1", port)
        assert not connects("127.0.0.2", port)
        assert not any(connects(address, port) for address in other_addresses())
    assert capsys.readouterr().err == f"http://127.0.0.1:{port} is the chat page; Ctrl-C ends it\n"
    with serving(lambda: serve(echo, OWN, "远", host="0.0.0.0", port=0)) as port:
        assert all(connects(address, port) for address in ("127.0.0.1", "127.0.0.2", *other_addresses()))
    assert f"note: whoever reaches this machine on port {port} may use the model" in capsys.readouterr().err


def other_addresses():
    """This machine's, beside the loopback."""
    found = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    return [address for address in found if not address.startswith("127.")]


def connects(address, port):
    with socket.socket() as client:
        client.settimeout(5)
        return client.connect_ex((address, port)) == 0


def echo(turns, question, config):
    yield question


def body(question, **changes):
    return {"turns": [], "question": question, "decoding": DECODING, **changes}


def post(port, content, **headers):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = {"Content-Type": "application/json", **headers}
    return urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/answer", data, headers), timeout=20)


EVERY_TYPE = (None, True, 0, -1, 1e308, "", "0", "\ud800", [], [["问"]], {}, {"text": "问"})
"""A value of every type that JSON has, and extreme ones."""


def changed(content, path, value):
    """A body with another value in one place; without the place where the value is `...`."""
    *above, name = path
    copied = inner = json.loads(json.dumps(content))
    for part in above:
        inner = inner[part]
    if value is ...:
        del inner[name]
    else:
        inner[name] = value
    return copied


def refused_bodies():
    """Bodies that are no question: each field missing, of every other type, and beyond its range."""
    whole = body("问", turns=[["问", "答"]])
    places = [("turns",), ("turns", 0), ("turns", 0, 0), ("turns", 0, 1), ("question",), ("decoding",)]
    settings = [("decoding", name) for name in DECODING]
    for path in [*places, *settings]:
        if path != ("turns", 0):
            yield changed(whole, path, ...)
        for value in (*EVERY_TYPE, float("nan"), float("inf"), -float("inf"), 10**400):
            text = path in (("question",), ("turns", 0, 0), ("turns", 0, 1)) and value in ("", "0")
            greedy = path == ("decoding", "temperature") and value == 0 and value is not False
            if not (text or greedy or (path == ("turns",) and value == [])):
                yield changed(whole, path, value)
    for name, values in {
        "temperature": (1e-300, 5e-324, 0.009, 2.001),
        "top_p": (0, 1e-9, 1.001),
        "repetition_penalty": (0, 0.99, 2.001),
        "max_new_tokens": (0, 1.5, 1025, 10**9),
    }.items():
        yield from (changed(whole, ("decoding", name), value) for value in values)
    yield changed(whole, ("turns",), "ab")
    yield changed(whole, ("turns",), ["ab"])
    yield changed(whole, ("turns",), [{"问": 1, "答": 2}])
    yield changed(whole, ("more",), 1)
    yield changed(whole, ("decoding", "top_k"), 1)
    yield from EVERY_TYPE
    yield from (b"", b"{", b"\xff", b"[" * 100_000, b'{"turns": ' * 100_000, json.dumps(whole).encode()[:-1])


def test_what_is_no_question_of_the_page_is_refused(capsys):
    def answer(turns, question, config):
        raise AssertionError("asked")

    with serving(lambda: serve(answer, OWN, "拒", port=0)) as port:
        count = 0
        for content in refused_bodies():
            assert refusal(port, content) == 400, content
            count += 1
        assert count > 150
        assert refusal(port, body("问"), **{"Content-Type": "text/plain"}) == 415
        assert refusal(port, body("问"), Host="example.org") == 400
        assert refusal(port, body("问" * MOST_BYTES)) == 413
        for path, code in (("/nowhere", 404), ("/%00", 404), ("/..%2f..%2fserver.py", 404), ("/answer", 404)):
            with pytest.raises(urllib.error.HTTPError) as raised:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{path}")
            assert raised.value.code == code
            raised.value.close()
        with socket.create_connection(("127.0.0.1", port)) as client:  # a browser that is gone in the middle
            head = f"POST /answer HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert refusal(port, b"") == 400
    assert "Traceback" not in capsys.readouterr().err


def refusal(port, content, **headers):
    """The code of an answer that refuses a request in one line."""
    with pytest.raises(urllib.error.HTTPError) as raised:
        post(port, content, **headers)
    with raised.value as refused:
        text = refused.read().decode()
    assert text
    assert "\n" not in text
    assert len(text) < 300
    return refused.code


def test_the_ends_of_every_range_are_answered(fluent_folder, capsys):
    with serving(lambda: chat(str(fluent_folder), web=True, port=0, device="cpu", seed=0)) as port:
        for name, values in {
            "temperature": (0, 0.01, 2),
            "top_p": (0.01, 1),
            "repetition_penalty": (1, 2),
            "max_new_tokens": (1,),
        }.items():
            for value in values:
                lines = post(port, body("你好", decoding={**DECODING, "max_new_tokens": 3, name: value}))
                assert [json.loads(line) for line in lines][-1] == {"done": True}, (name, value)
        content_type = {"Content-Type": "application/json; charset=utf-8"}
        assert json.loads([*post(port, body("", decoding={**DECODING, "max_new_tokens": 1}), **content_type)][-1])
    assert "Traceback" not in capsys.readouterr().err


def test_headers_forbid_foreign_scripts_and_frames_also_where_a_request_is_refused():
    with serving(lambda: serve(echo, OWN, "头\udcff", port=0)) as port:
        answers = [urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") for path in ("/", "/settings", "/chat.js")]
        answers.append(post(port, body("问")))
        for path, host in (("/nowhere", "localhost"), ("/", "example.org")):
            with pytest.raises(urllib.error.HTTPError) as raised:
                urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Host": host}))
            answers.append(raised.value)
        for answer in answers:
            with answer:
                policy = dict(
                    part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";")
                )
                assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
                assert {policy[name] for name in policy if name.endswith("-src")} == {"'none'", "'self'"}
                assert answer.headers["X-Frame-Options"] == "DENY"
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                assert answer.headers["Referrer-Policy"] == "no-referrer"


def test_no_other_page_shows_this_one_in_a_frame(browser, tmp_path):
    with serving(lambda: serve(echo, OWN, "框", port=0)) as port:
        (tmp_path / "frame.html").write_text(f"<iframe src='http://127.0.0.1:{port}/'></iframe>")
        page, said = browser.new_page(), []
        page.on("console", lambda message: said.append(message.text))
        page.goto(f"file://{tmp_path}/frame.html")
        page.wait_for_timeout(500)
        shown = [frame for frame in page.frames if frame.locator(".example, #question").count()]
        page.close()
    assert shown == []
    assert "frame-ancestors" in " ".join(said)


def test_an_answer_is_copied_and_given_anew(open_page):
    told, answers = [], iter(("一", "二", RuntimeError("no memory"), "三"))

    def answer(turns, question, config):
        told.append((list(turns), question))
        answered = next(answers)
        if isinstance(answered, Exception):
            raise answered
        yield answered

    with serving(lambda: serve(answer, OWN, "再", port=0)) as port:
        page = open_page(port)
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        ask(page, "问")
        expect(last(page)).to_have_text("一")
        page.get_by_role("button", name="复制").click()
        expect(page.get_by_role("button", name="已复制")).to_be_visible()
        assert page.evaluate("navigator.clipboard.readText()") == "一"
        again = page.get_by_role("button", name="重新生成")
        again.click()
        expect(page.locator(".answered")).to_have_text(["二"])
        again.click()
        expect(page.locator(".wrong")).to_contain_text("no memory")
        expect(page.locator(".answered").first).to_have_text("二", use_inner_text=True)
        assert page.locator(".answered:visible").first.inner_text() == "二", "what was said stays"
        ask(page, "又")
        expect(last(page)).to_have_text("三")
        expect(again).to_have_count(1)
        page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")  # as on another machine
        page.get_by_role("button", name="复制").last.click()
        expect(page.get_by_role("button", name="已复制")).to_be_visible()
        page.locator("#clear").click()
        expect(page.locator(".actions")).to_have_count(0)
    assert told == [([], "问"), ([], "问"), ([], "问"), ([("问", "二")], "又")]


@pytest.mark.parametrize("width", [390, 1280])
def test_the_settings_are_folded_on_a_phone(open_page, width, tmp_path):
    with serving(lambda: serve(echo, OWN, "窄", port=0)) as port:
        page = open_page(port, width)
        sliders_shown = expect(page.locator("#temperature"))
        page.screenshot(path=tmp_path / "page.png")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        if width < 720:
            sliders_shown.to_be_hidden()
            assert page.locator("aside").bounding_box()["height"] < 60
            page.get_by_text("解码参数").click()
        sliders_shown.to_be_visible()
        ask(page, "问")
        expect(last(page)).to_have_text("问")


def test_a_range_holds_the_models_own_settings():
    wide = sliders(GenerationConfig(max_new_tokens=4000, do_sample=True, temperature=2.5, top_p=0.5))
    assert (wide["max_new_tokens"].most, wide["temperature"].most, wide["temperature"].start) == (4000, 2.5, 2.5)
    assert wide["repetition_penalty"].start == 1
    assert sliders(GenerationConfig(max_new_tokens=4, do_sample=False))["temperature"].start == 0


def test_where_the_page_cannot_be_served_one_line_says_why(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(FireflyError, match=f"--host 127.0.0.1 --port {port}: .*in use.*choose another") as raised:
            serve(echo, OWN, "满", port=port)
        raised_line(raised)
    with pytest.raises(FireflyError, match=r"--host no.such.host.invalid --port 0: nothing can listen there"):
        serve(echo, OWN, "无", host="no.such.host.invalid", port=0)
    with pytest.raises(FireflyError, match="--port 70000: no port has that number"):
        serve(echo, OWN, "无", port=70000)
    told = one_line(run("firefly", "chat", "--model", "x", "--web", "--prompt", "你好", check=False))
    assert told == "--web and --prompt are both given; leave one of them out"
    monkeypatch.setattr("firefly_lightning.errors.find_spec", lambda name: None)
    with pytest.raises(FireflyError, match=r'starlette is not installed; run pip install "firefly-lightning\[web\]"'):
        chat("x", web=True)
