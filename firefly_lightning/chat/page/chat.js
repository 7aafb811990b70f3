// The chat page. It keeps the conversation; what it shows is always text, never markup.
const NAMES = {
  temperature: "温度",
  top_p: "核采样",
  repetition_penalty: "重复惩罚",
  max_new_tokens: "最多生成的词元数",
};

const find = (id) => document.getElementById(id);
const [examples, turnsShown, talk, question] = ["examples", "turns", "talk", "question"].map(find);
let turns = []; // [question, answer], as the model will be told
let coming = null; // AbortController of the answer that is being streamed

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

const isAtEnd = () => talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;

function showTurn(className, text) {
  const turn = element("div", `turn ${className}`, "");
  turn.append(element("div", "", text));
  turnsShown.append(turn);
  talk.scrollTop = talk.scrollHeight;
  return turn;
}

function makeSlider(name, { least, most, step, start }) {
  const label = element("label", "", "");
  const input = document.createElement("input");
  Object.assign(input, { type: "range", id: name, min: least, max: most, step, value: start });
  const output = element("output", "", input.value);
  input.addEventListener("input", () => { output.textContent = input.value; });
  label.append(output, element("span", "", `${NAMES[name]} `), element("small", "", name), input);
  find("sliders").append(label);
}

function makeExample({ kind, description, input }) {
  const button = Object.assign(element("button", "example", ""), { type: "button", title: input });
  button.dataset.kind = kind;
  button.append(element("small", "", description), element("span", "", input));
  button.addEventListener("click", () => { question.value = input; question.focus(); });
  examples.append(button);
}

// Calls take(line) with every JSON line of a response; a character may be spread over chunks, and a line too.
async function readLines(response, take) {
  let rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let read = await reader.read(); !read.done; read = await reader.read()) {
    const lines = (rest + read.value).split("\n");
    rest = lines.pop();
    lines.forEach((line) => take(JSON.parse(line)));
  }
}

async function stream(text, take, signal) {
  const decoding = Object.fromEntries(Object.keys(NAMES).map((name) => [name, +find(name).value]));
  const response = await fetch("answer", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ turns, question: text, decoding }),
    signal,
  });
  if (!response.ok) throw new Error(await response.text());
  let done = false;
  await readLines(response, (line) => {
    if (line.error) throw new Error(line.error);
    done ||= line.done;
    if (line.piece) take(line.piece);
  });
  if (!done) throw new Error("连接中断，回答不完整");
}

function setComing(controller) {
  coming = controller;
  find("send").hidden = Boolean(controller);
  find("stop").hidden = !controller;
}

function action(name, take) {
  const button = Object.assign(element("button", "", name), { type: "button" });
  button.addEventListener("click", () => take(button));
  return button;
}

// A browser gives the clipboard only to pages of this machine or by https; others copy what is selected.
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = element("textarea", "", text);
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  if (!copied) throw new Error("not copied");
}

// What can be done with an answer; only the last one can be given anew.
function showActions({ text, answer, told, shown }) {
  const atEnd = isAtEnd();
  turnsShown.querySelectorAll(".again").forEach((button) => button.remove());
  const actions = element("div", "actions", "");
  const again = action("重新生成", () => {
    if (coming) return;
    told.pop();
    respond(text, { answer, nodes: [shown, actions] });
  });
  again.classList.add("again");
  actions.append(action("复制", async (button) => {
    button.textContent = await copy(answer).then(() => "已复制", () => "无法复制");
    setTimeout(() => { button.textContent = "复制"; }, 1500);
  }), again);
  shown.after(actions);
  if (atEnd) talk.scrollTop = talk.scrollHeight;
}

// Streams the answer to a question. An answer that it takes the place of goes only when the new one is there.
async function respond(text, replaced = null) {
  const shown = showTurn("answered coming", "");
  replaced?.nodes.forEach((node) => { node.hidden = true; });
  replaced?.nodes.at(-1).after(shown);
  let answer = "";
  const controller = new AbortController();
  const told = turns; // the conversation may be cleared meanwhile
  setComing(controller);
  const keep = () => {
    told.push([text, answer]);
    replaced?.nodes.forEach((node) => node.remove());
    if (shown.isConnected) showActions({ text, answer, told, shown });
  };
  try {
    await stream(text, (piece) => {
      const atEnd = isAtEnd();
      shown.firstChild.textContent = answer += piece;
      if (atEnd) talk.scrollTop = talk.scrollHeight; // a reader who has scrolled up stays there
    }, controller.signal);
    keep();
  } catch (error) {
    if (controller.signal.aborted) keep(); // what was said until then was said
    else {
      showTurn("answered wrong", `出错了：${error.message}`);
      if (replaced) told.push([text, replaced.answer]);
      else question.value ||= text;
      replaced?.nodes.forEach((node) => { node.hidden = false; });
    }
  } finally {
    shown.classList.remove("coming");
    if (coming === controller) setComing(null);
  }
}

function ask(text) {
  examples.hidden = true;
  showTurn("asked", text);
  return respond(text);
}

find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || coming) return;
  question.value = "";
  ask(text);
});

question.addEventListener("keydown", (event) => {
  // While an input method composes Chinese characters, Enter is for it.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  find("ask").requestSubmit();
});

find("stop").addEventListener("click", () => coming?.abort());

find("clear").addEventListener("click", () => {
  coming?.abort();
  turns = [];
  turnsShown.replaceChildren();
  examples.hidden = false;
});

// On a phone the settings would take half of the page: there they begin folded.
const narrow = matchMedia("(max-width: 720px)");
const fold = () => { find("decoding").open = !narrow.matches; };
narrow.addEventListener("change", fold);
fold();

const settings = await (await fetch("settings")).json();
find("model").textContent = settings.model;
Object.entries(settings.sliders).forEach(([name, slider]) => makeSlider(name, slider));
settings.examples.forEach(makeExample);
