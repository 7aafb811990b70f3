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
from transformers import BloomForCausalLM, GenerationConfig

from firefly_lightning.chat.command import chat
from firefly_lightning.chat.server import serve, sliders
from firefly_lightning.errors import FireflyError
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

    def open_it(port):
        page = browser.new_page(viewport={"width": 1200, "height": 800})
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
    generated, generate = [], BloomForCausalLM.generate

    def record(self, inputs, **kwargs):
        generated.append((inputs[0].tolist(), kwargs["generation_config"]))
        return generate(self, inputs, **kwargs)

    monkeypatch.setattr(BloomForCausalLM, "generate", record)
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
    published, greedy, drawn = (tuple(getattr(config, name) for name in names) for _, config in generated)
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


def test_what_is_no_question_of_the_page_is_refused():
    refused = [
        (b"{", {}, 400),
        (b"\xff", {}, 400),
        ([], {}, 400),
        ({"question": "问"}, {}, 400),
        (body(1), {}, 400),
        (body("问", turns=[["问"]]), {}, 400),
        (body("问", turns=[["问", 2]]), {}, 400),
        (body("问", decoding={**DECODING, "temperature": -1}), {}, 400),
        (body("问", decoding={**DECODING, "top_p": float("nan")}), {}, 400),
        (body("问", decoding={**DECODING, "max_new_tokens": "9"}), {}, 400),
        (body("问", decoding={**DECODING, "max_new_tokens": 10**9}), {}, 400),
        (body("问"), {"Content-Type": "text/plain"}, 415),
        (body("问"), {"Host": "example.org"}, 400),
    ]

    def answer(turns, question, config):
        raise AssertionError("asked")

    with serving(lambda: serve(answer, OWN, "拒", port=0)) as port:
        for content, headers, code in refused:
            with pytest.raises(urllib.error.HTTPError) as raised:
                post(port, content, **headers)
            assert raised.value.code == code, (content, headers)
            raised.value.close()


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
    monkeypatch.setattr("firefly_lightning.chat.command.find_spec", lambda name: None)
    with pytest.raises(FireflyError, match=r'starlette is not installed; run pip install "firefly-lightning\[web\]"'):
        chat("x", web=True)
