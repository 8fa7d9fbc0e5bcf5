"use strict";
const MOST_COLUMNS = 4,
  ALTERNATIVES = 5;
const STORE = {draft: "minisft-draft", chat: "minisft-chat"};
const SETTINGS = ["temperature", "top_p", "max_tokens", "seed"];
const HEAT = [0.9, 0.7, 0.5, 0.25, 0.1]; // the class p0 to p5 of a token is the number of these above its probability
const ICONS = {
  copy: ["M6 6h8v8H6z", "M10 6V3a1 1 0 0 0-1-1H3a1 1 0 0 0-1 1v6a1 1 0 0 0 1 1h3"],
  again: ["M13 8a5 5 0 1 1-1.6-3.7", "M13 1.8v3h-3"],
  up: [
    "M2 7.5h2.5V14H2z",
    "M4.5 7.5 7 2c1 0 1.8.6 1.6 1.9L8.2 6.5h4.3c.9 0 1.5.8 1.3 1.6l-1 4.6c-.2.8-.8 1.3-1.6 1.3H4.5",
  ],
  down: [
    "M2 8.5h2.5V2H2z",
    "M4.5 8.5 7 14c1 0 1.8-.6 1.6-1.9l-.4-2.6h4.3c.9 0 1.5-.8 1.3-1.6l-1-4.6c-.2-.8-.8-1.3-1.6-1.3H4.5",
  ],
  save: ["M8 2v8", "M4.8 7.2 8 10.4l3.2-3.2", "M2.5 13.5h11"],
  remove: ["M4 4l8 8", "M12 4l-8 8"],
};
const $ = (id) => document.getElementById(id);

let models = []; // the names that the server lists
let apiKey = ""; // kept in memory only
let columns = []; // {id, model, epoch, controller, running}
let turns = []; // {question, answers: {column id: answer}, node, bodies: {column id: element}}
let shown = 0; // the column that a phone shows
let nextColumn = 1;

// --- elements: text goes into text nodes only, so that nothing a model wrote is read as HTML

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  for (const line of ICONS[name]) {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", line);
    svg.append(path);
  }
  return svg;
}

const button = (attributes, ...children) => element("button", {type: "button", ...attributes}, ...children);
const iconButton = (name, label, onclick, more = {}) =>
  button({"aria-label": label, title: label, onclick, ...more}, icon(name));

let noteTimer;
function note(text) {
  $("note").textContent = text;
  clearTimeout(noteTimer);
  noteTimer = setTimeout(() => {
    $("note").textContent = "";
  }, 4000);
}

// --- the server

class ServerError extends Error {}

async function call(path, body, signal) {
  for (;;) {
    const sent = apiKey;
    const headers = {...(body && {"Content-Type": "application/json"}), ...(sent && {Authorization: `Bearer ${sent}`})};
    let response;
    try {
      response = await fetch(path, {
        method: body ? "POST" : "GET",
        headers,
        body: body && JSON.stringify(body),
        signal,
      });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ServerError("The server does not answer. Is `minisft serve` still running?");
    }
    if (response.status === 401 && (apiKey !== sent || (await askKey(Boolean(sent))))) continue;
    if (!response.ok) throw new ServerError(await problemOf(response));
    return response;
  }
}

async function problemOf(response) {
  const text = await response.text();
  try {
    const {error, detail} = JSON.parse(text);
    const message = error?.message ?? detail;
    if (message) return typeof message === "string" ? message : JSON.stringify(message);
  } catch {
    /* not JSON: its text is shown */
  }
  return `The server answered with status ${response.status}. ${text.slice(0, 500)}`;
}

let asking; // one dialog for all requests that were refused
function askKey(refused) {
  asking ??= new Promise((done) => {
    const dialog = $("key-dialog");
    $("key-problem").textContent = refused
      ? "The server does not take this key."
      : "The server asks for the key that it was started with.";
    $("key").value = "";
    dialog.addEventListener(
      "close",
      () => {
        asking = undefined;
        const given = dialog.returnValue === "use" && $("key").value.replace(/[^\x20-\x7e]/g, "?"); // a header is ASCII
        if (given) apiKey = given;
        $("key").value = "";
        done(Boolean(given));
      },
      {once: true},
    );
    dialog.returnValue = "";
    dialog.showModal();
    $("key").focus();
  });
  return asking;
}

// Server-sent events: each is a line "data: JSON"; the last is "data: [DONE]".
async function* events(response) {
  const reader = response.body.getReader(),
    decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read();
    rest += done ? decoder.decode() + "\n" : decoder.decode(value, {stream: true});
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
    if (done) return;
  }
}

// --- requests

function settings() {
  const values = {};
  for (const name of SETTINGS) if ($(name).value.trim() !== "") values[name] = Number($(name).value);
  return values;
}

// The messages before the answer to a turn, as this column has them.
function messagesBefore(column, turn) {
  const messages = $("system").value ? [{role: "system", content: $("system").value}] : [];
  for (const earlier of turns) {
    messages.push({role: "user", content: earlier.question});
    if (earlier === turn) return messages;
    messages.push(messageOf(earlier.answers[column.id]));
  }
  return messages;
}

function messageOf({text, reasoning, calls}) {
  const tools = calls.map(({id, name, args}, place) => ({
    id: id || `call_${place}`,
    type: "function",
    function: {name, arguments: args},
  }));
  return {
    role: "assistant",
    content: text,
    ...(reasoning && {reasoning_content: reasoning}),
    ...(tools.length && {tool_calls: tools}),
  };
}

function isAnswered(answer) {
  if (!answer || answer.failure || answer.state === "running") return false;
  // An answer that was stopped before its first word is none.
  return Boolean(answer.text || answer.calls.length || answer.state === "done");
}

// Answer, in order, all turns that the column has no answer to.
async function answerAll(column) {
  const epoch = ++column.epoch;
  column.controller?.abort();
  column.running = true;
  drawUnanswered(column);
  showRunning();
  for (const turn of [...turns]) {
    if (epoch !== column.epoch) return;
    if (isAnswered(turn.answers[column.id])) continue;
    const answer = await answerTurn(column, turn, turn.answers[column.id]?.tries ?? 0);
    if (epoch !== column.epoch) return;
    if (!isAnswered(answer)) break;
  }
  column.running = false;
  drawUnanswered(column);
  showRunning();
  keepChat();
}

async function answerTurn(column, turn, tries) {
  // 1. The request. Another try with a seed takes the next seed, or it would give the same answer.
  const chosen = settings();
  if (chosen.seed !== undefined) chosen.seed += tries;
  const messages = messagesBefore(column, turn);
  const answer = {
    model: column.model,
    state: "running",
    text: "",
    reasoning: "",
    calls: [],
    tokens: [],
    settings: chosen,
    messages,
    tries,
  };
  turn.answers[column.id] = answer;
  atEnd(() => drawAnswer(column, turn));
  const controller = (column.controller = new AbortController()),
    began = performance.now();
  const body = {
    model: column.model,
    messages,
    ...chosen,
    stream: true,
    stream_options: {include_usage: true},
    logprobs: true,
    top_logprobs: ALTERNATIVES,
  };

  // 2. Its events.
  try {
    const response = await call("v1/chat/completions", body, controller.signal);
    for await (const event of events(response)) {
      if (event.error) throw new ServerError(event.error.message || JSON.stringify(event.error));
      take(answer, event, began);
      followAnswer(column, turn);
    }
    if (!answer.finish) throw new ServerError("The connection ended before the answer did.");
    answer.state = "done";
  } catch (error) {
    answer.state = "stopped";
    if (!controller.signal.aborted)
      answer.failure = error instanceof ServerError ? error.message : `The answer could not be read: ${error.message}`;
  }

  // 3. The result, which is read out.
  answer.seconds = (performance.now() - began) / 1000;
  if (turn.answers[column.id] === answer) {
    atEnd(() => drawAnswer(column, turn));
    $("status").textContent = `${answer.model}: ${answer.failure || answer.text.slice(0, 600) || "an empty answer"}`;
  }
  return answer;
}

function take(answer, event, began) {
  if (event.usage) answer.count = event.usage.completion_tokens;
  const choice = event.choices?.[0];
  if (!choice) return;
  const delta = choice.delta ?? {};
  answer.text += delta.content ?? "";
  answer.reasoning += delta.reasoning_content ?? delta.reasoning ?? "";
  for (const part of delta.tool_calls ?? []) {
    let known = answer.calls.find(({index}) => index === part.index);
    if (!known) answer.calls.push((known = {index: part.index, id: "", name: "", args: ""}));
    known.id ||= part.id ?? "";
    known.name += part.function?.name ?? "";
    known.args += part.function?.arguments ?? "";
  }
  for (const token of choice.logprobs?.content ?? []) {
    answer.tokens.push({
      text: tokenText(token),
      logprob: token.logprob,
      top: (token.top_logprobs ?? []).map((other) => ({text: tokenText(other), logprob: other.logprob})),
    });
  }
  if (choice.finish_reason) answer.finish = choice.finish_reason;
  answer.first ??= (performance.now() - began) / 1000;
}

// A token may hold a part of a character only; its bytes are shown then.
function tokenText({token, bytes}) {
  if (!Array.isArray(bytes) || !bytes.length) return token;
  try {
    return new TextDecoder("utf-8", {fatal: true, ignoreBOM: true}).decode(Uint8Array.from(bytes));
  } catch {
    return `⟨${bytes.map((byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ")}⟩`;
  }
}

// --- light Markdown: code, bold, headings and lists, as elements

function inline(text) {
  return text
    .split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)
    .filter(Boolean)
    .map((part) => {
      if (/^`[^`\n]+`$/.test(part)) return element("code", {}, part.slice(1, -1));
      if (/^\*\*[^*\n]+\*\*$/.test(part)) return element("strong", {}, part.slice(2, -2));
      return part;
    });
}

function markdown(text) {
  const blocks = [];
  let paragraph = [],
    list = null,
    code = null;
  const flush = () => {
    if (paragraph.length) blocks.push(element("p", {}, ...inline(paragraph.join("\n"))));
    paragraph = [];
    list = null;
  };
  for (const line of text.split("\n")) {
    if (/^\s*```/.test(line)) {
      if (code) {
        code = null;
        continue;
      }
      flush();
      code = element("code");
      blocks.push(element("pre", {tabindex: "0"}, code));
      continue;
    }
    if (code) {
      code.append((code.firstChild ? "\n" : "") + line);
      continue;
    }
    const item = /^ {0,3}(?:([-*+])|(\d{1,9})[.)]) +(.*)$/.exec(line),
      head = /^#{1,6} +(.*)$/.exec(line);
    if (item) {
      const kind = item[1] ? "UL" : "OL";
      if (paragraph.length || list?.nodeName !== kind) {
        flush();
        list = element(kind.toLowerCase(), {start: item[2]});
        blocks.push(list);
      }
      list.append(element("li", {}, ...inline(item[3])));
    } else if (head) {
      flush();
      blocks.push(element("h3", {}, ...inline(head[1])));
    } else if (!line.trim()) {
      flush();
    } else {
      list = null;
      paragraph.push(line);
    }
  }
  flush();
  return blocks;
}

// --- tokens and their probabilities

function percent(logprob) {
  const share = Math.exp(logprob) * 100;
  if (share < 0.001) return "< 0.001 %";
  return `${share < 0.1 ? share.toPrecision(1) : share < 99.95 ? share.toFixed(1) : "100"} %`;
}

const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ | $/g, "␣") || "(empty)";

function tokenNode(token, first) {
  const heat = HEAT.filter((limit) => Math.exp(token.logprob) < limit).length;
  const node = element(
    "span",
    {
      class: `token p${heat}`,
      role: "button",
      tabindex: first ? "0" : "-1",
      "aria-label": `${token.text.trim() || visible(token.text)}, ${percent(token.logprob)}`,
    },
    token.text.replaceAll("\n", "⏎\n"),
  );
  const show = () => showTip(node, token);
  node.addEventListener("pointerenter", show);
  node.addEventListener("focus", show);
  node.addEventListener("click", show);
  node.addEventListener("pointerleave", hideTip);
  node.addEventListener("blur", hideTip);
  return node;
}

function showTip(node, token) {
  const choices = token.top.some((other) => other.text === token.text) ? token.top : [token, ...token.top];
  const rows = [...choices]
    .sort((a, b) => b.logprob - a.logprob)
    .map((other) => {
      const bar = element("span");
      bar.style.width = `${Math.exp(other.logprob) * 100}%`;
      return element(
        "tr",
        {class: other.text === token.text && other.logprob === token.logprob && "chosen"},
        element("td", {}, visible(other.text)),
        element("td", {}, percent(other.logprob)),
        element("td", {class: "bar"}, bar),
      );
    });
  const tip = $("tip");
  tip.replaceChildren(
    element("table", {}, element("tbody", {}, ...rows)),
    ...(token.top.length ? [] : [element("p", {class: "none"}, "no alternatives were sent")]),
  );
  tip.hidden = false;
  node.setAttribute("aria-describedby", "tip");
  const place = node.getClientRects()[0] ?? node.getBoundingClientRect(),
    box = tip.getBoundingClientRect();
  const board = $("board"),
    around = board.getBoundingClientRect(); // the tip scrolls with the tokens
  const top = place.bottom + 6 + box.height < around.bottom ? place.bottom + 6 : place.top - box.height - 6;
  const left = Math.max(8, Math.min(place.left - around.left, board.clientWidth - box.width - 8));
  tip.style.left = `${left + board.scrollLeft}px`;
  tip.style.top = `${Math.max(0, top - around.top + board.scrollTop)}px`;
}

function hideTip(event) {
  event?.target?.removeAttribute?.("aria-describedby");
  $("tip").hidden = true;
}

// One stop of the Tab key for all tokens of an answer; the arrow keys move among them.
function moveAmongTokens(event) {
  const steps = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity}[event.key];
  if (!steps || !event.target.classList.contains("token")) return;
  event.preventDefault();
  const all = [...event.currentTarget.children];
  const to = all[Math.max(0, Math.min(all.length - 1, all.indexOf(event.target) + steps))];
  event.target.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
}

// --- drawing

function count(node) {
  node.style.setProperty("--count", columns.length);
  node.dataset.count = columns.length;
}

const addButton = (attributes) =>
  button({title: "Add a model that answers the same questions", onclick: addColumn, ...attributes}, "+ Compare");

function drawHeads() {
  count($("heads"));
  $("heads").replaceChildren(
    ...columns.map((column, place) => {
      const choice = element(
        "select",
        {"aria-label": `Model of column ${place + 1}`, onchange: () => changeModel(column, choice.value)},
        ...models.map((name) => element("option", {value: name, selected: name === column.model}, name)),
      );
      const head = element("div", {class: `head ${place === shown ? "current" : ""}`}, choice);
      head.append(
        iconButton("save", "Save this conversation as a ShareGPT row", () => saveRow(column), {class: "save"}),
      );
      if (columns.length > 1)
        head.append(iconButton("remove", `Remove column ${place + 1}`, () => removeColumn(column), {class: "remove"}));
      if (columns.length < MOST_COLUMNS && place === columns.length - 1) head.append(addButton({id: "add"}));
      return head;
    }),
  );
  $("tabs").hidden = columns.length < 2;
  $("tabs").replaceChildren(
    ...columns.map((column, place) =>
      button({"aria-current": place === shown ? "true" : "false", onclick: () => showColumn(place)}, column.model),
    ),
  );
  if (columns.length > 1 && columns.length < MOST_COLUMNS) $("tabs").append(addButton({class: "more"}));
}

function showColumn(place) {
  shown = Math.max(0, Math.min(columns.length - 1, place));
  [...$("tabs").querySelectorAll("[aria-current]")].forEach((tab, index) =>
    tab.setAttribute("aria-current", String(index === shown)),
  );
  [...$("heads").children].forEach((head, index) => head.classList.toggle("current", index === shown));
  for (const turn of turns)
    columns.forEach((column, index) => turn.bodies[column.id]?.classList.toggle("current", index === shown));
}

function drawTurns() {
  $("turns").replaceChildren();
  turns.forEach(drawTurn);
  $("empty").hidden = turns.length > 0;
}

function drawTurn(turn) {
  turn.node = element("section", {class: "turn columns", "aria-label": `Question ${turns.indexOf(turn) + 1}`});
  count(turn.node);
  turn.bodies = {};
  const question = element("div", {class: "question"});
  const show = () => {
    const edit = button(
      {
        onclick: () => {
          question.replaceChildren(...editor(turn, show));
          question.firstChild.focus();
        },
        class: "edit-question",
      },
      "Edit",
    );
    question.replaceChildren(element("div", {class: "said"}, turn.question), element("div", {class: "actions"}, edit));
  };
  show();
  turn.node.append(question);
  columns.forEach((column, place) => {
    turn.bodies[column.id] = element("div", {
      class: `answer ${place === shown ? "current" : ""}`,
      role: "group",
      "aria-label": `Answer of ${column.model}`,
    });
    turn.node.append(turn.bodies[column.id]);
    drawAnswer(column, turn);
  });
  $("turns").append(turn.node);
}

function editor(turn, cancel) {
  const field = element("textarea", {
    class: "edit",
    rows: "3",
    "aria-label": "Edit the message",
    onkeydown: (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
        turn.node.querySelector(".edit-question").focus();
      }
      if (sends(event)) {
        event.preventDefault();
        change(turn, field.value);
      }
    },
  });
  field.value = turn.question;
  return [
    field,
    element(
      "div",
      {class: "actions"},
      button({onclick: cancel}, "Cancel"),
      button({class: "main", onclick: () => change(turn, field.value)}, "Send again"),
    ),
  ];
}

function drawAnswer(column, turn) {
  const box = turn.bodies?.[column.id],
    answer = turn.answers[column.id];
  if (!box) return;
  if (!answer) {
    const reason = column.running ? "waits for the answers above" : "not asked: an answer above is missing";
    box.replaceChildren(element("p", {class: "soft"}, reason));
    return;
  }
  const parts = [];
  if (answer.reasoning) {
    const open = box.querySelector(".reasoning")?.open;
    const texts = [element("summary", {}, "Reasoning"), element("div", {}, answer.reasoning)];
    parts.push(element("details", {class: "reasoning", open}, ...texts));
  }
  parts.push(bodyOf(answer));
  for (const {name, args} of answer.calls) {
    const texts = ["Calls the tool ", element("code", {}, name), element("pre", {tabindex: "0"}, pretty(args))];
    parts.push(element("div", {class: "call"}, ...texts));
  }
  if (answer.failure) parts.push(element("p", {class: "failure"}, answer.failure));
  if (answer.state !== "running") parts.push(...footOf(column, turn, answer));
  box.replaceChildren(...parts);
}

function bodyOf(answer) {
  const body = element("div", {class: "body"});
  if (answer.state === "running" && !answer.text && !answer.reasoning && !answer.calls.length) {
    body.append(
      element(
        "span",
        {class: "wait", role: "img", "aria-label": `${answer.model} is working`},
        element("i"),
        element("i"),
        element("i"),
      ),
    );
  } else if ($("probabilities").checked && answer.tokens.length) {
    const all = element("div", {
      class: "tokens",
      role: "toolbar",
      "aria-label": "Tokens with their probabilities",
      onkeydown: moveAmongTokens,
    });
    all.append(...answer.tokens.map((token, place) => tokenNode(token, place === 0)));
    body.append(all);
  } else if (answer.text) {
    body.append(...markdown(answer.text));
  } else if (answer.state === "done" && !answer.calls.length) {
    body.append(element("p", {class: "soft"}, "(an empty answer)"));
  }
  return body;
}

function pretty(args) {
  try {
    return JSON.stringify(JSON.parse(args), null, 2);
  } catch {
    return args;
  }
}

function footOf(column, turn, answer) {
  // 1. The figures.
  const number = answer.count ?? answer.tokens.length,
    figures = [];
  if (number) figures.push(`${number} token${number === 1 ? "" : "s"}`);
  if (number && answer.seconds) figures.push(`${answer.seconds.toFixed(1)} s`);
  if (number > 1 && answer.seconds > answer.first)
    figures.push(`${((number - 1) / (answer.seconds - answer.first)).toFixed(1)} tokens/s`);
  if (answer.finish === "length") figures.push("cut at max tokens");
  if (answer.state === "stopped" && !answer.failure) figures.push("stopped");
  const foot = figures.length ? [element("p", {class: "figures"}, figures.join(" · "))] : [];

  // 2. What can be done with the answer.
  const actions = element("div", {class: "actions"});
  if (answer.text)
    actions.append(
      iconButton("copy", "Copy the answer", () => copy(answer.text, "The answer is copied."), {class: "copy"}),
    );
  if (turn === turns.at(-1) || !isAnswered(answer))
    actions.append(iconButton("again", "Answer again", () => again(column, turn), {class: "again"}));
  actions.append(
    button(
      {
        class: "curl",
        title: "Copy the request as a curl command",
        onclick: () => copy(asCurl(answer), "The request is copied as curl."),
      },
      "curl",
    ),
    button(
      {
        class: "python",
        title: "Copy the request as Python, with the openai package",
        onclick: () => copy(asPython(answer), "The request is copied as Python."),
      },
      "Python",
    ),
  );
  if (document.body.dataset.preferences === "yes" && isAnswered(answer)) {
    for (const [rating, label] of [
      ["up", "Good answer"],
      ["down", "Bad answer"],
    ]) {
      actions.append(
        iconButton(rating, label, () => rate(column, turn, rating), {
          class: rating,
          "aria-pressed": String(answer.rating === rating),
        }),
      );
    }
  }
  return [...foot, actions];
}

// Draw something, and keep the end of the conversation in view if it was.
function atEnd(draw) {
  const board = $("board"),
    was = board.scrollHeight - board.scrollTop - board.clientHeight < 40;
  draw();
  if (was) board.scrollTop = board.scrollHeight;
}

function drawUnanswered(column) {
  for (const turn of turns) if (!turn.answers[column.id]) drawAnswer(column, turn);
}

// While an answer is streamed it is drawn once for each frame of the screen.
const waiting = new Map();
function followAnswer(column, turn) {
  if (!waiting.size)
    requestAnimationFrame(() => {
      atEnd(() => {
        for (const [answer, [ofColumn, ofTurn]] of waiting)
          if (ofTurn.answers[ofColumn.id] === answer && answer.state === "running")
            drawStreamed(ofColumn, ofTurn, answer);
      });
      waiting.clear();
    });
  waiting.set(turn.answers[column.id], [column, turn]);
}

function drawStreamed(column, turn, answer) {
  const all = turn.bodies[column.id].querySelector(".tokens");
  if (!all || !$("probabilities").checked) {
    drawAnswer(column, turn);
    return;
  }
  all.append(...answer.tokens.slice(all.children.length).map((token) => tokenNode(token, false)));
}

function showRunning() {
  const running = columns.some((column) => column.running);
  $("stop").hidden = !running;
  $("send").hidden = running;
  $("board").setAttribute("aria-busy", String(running));
}

// --- what the reader does

const sends = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

function send() {
  const question = $("draft").value;
  if (!question.trim() || columns.some((column) => column.running) || !columns.length) return;
  $("draft").value = "";
  fitDraft();
  const turn = {question, answers: {}};
  turns.push(turn);
  // Only the last answer can be given again: the one before it loses that button.
  if (turns.length > 1) columns.forEach((column) => drawAnswer(column, turns.at(-2)));
  drawTurn(turn);
  $("empty").hidden = true;
  $("board").scrollTop = $("board").scrollHeight;
  keepDraft();
  columns.forEach(answerAll);
}

function stop() {
  for (const column of columns) {
    if (!column.running) continue;
    column.epoch++;
    column.controller?.abort();
    column.running = false;
    drawUnanswered(column);
  }
  showRunning();
  setTimeout(keepChat); // when the answers know that they were stopped
}

function change(turn, question) {
  if (!question.trim()) return;
  stop();
  turns.length = turns.indexOf(turn) + 1;
  turn.question = question;
  turn.answers = {};
  drawTurns();
  columns.forEach(answerAll);
  $("draft").focus();
}

function again(column, turn) {
  const before = turn.answers[column.id];
  turn.answers[column.id] = {
    ...before,
    text: "",
    calls: [],
    state: "stopped",
    tries: before.tries + (before.failure ? 0 : 1),
  };
  if (before.settings.temperature === 0 && !before.failure && before.state === "done")
    note("At temperature 0 the answer is the same each time.");
  answerAll(column);
}

function addColumn() {
  const order = ["base", "final", ...models];
  const model =
    order.find((name) => models.includes(name) && !columns.some((column) => column.model === name)) ?? models[0];
  columns.push(newColumn(model));
  shown = columns.length - 1;
  drawHeads();
  drawTurns();
  $("heads").querySelector(".head:last-child select").focus();
  if (turns.length) answerAll(columns.at(-1));
  else keepChat();
}

const newColumn = (model) => ({id: nextColumn++, model, epoch: 0, running: false});

function forget(column) {
  column.epoch++;
  column.controller?.abort();
  column.running = false;
  for (const turn of turns) delete turn.answers[column.id];
}

function removeColumn(column) {
  forget(column);
  columns = columns.filter((other) => other !== column);
  shown = Math.min(shown, columns.length - 1);
  drawHeads();
  drawTurns();
  showRunning();
  keepChat();
  $("add")?.focus();
}

function changeModel(column, model) {
  forget(column);
  column.model = model;
  [...$("tabs").querySelectorAll("[aria-current]")][columns.indexOf(column)].textContent = model;
  drawTurns();
  if (turns.length) answerAll(column);
  else {
    showRunning();
    keepChat();
  }
}

function newChat() {
  stop();
  turns = [];
  drawTurns();
  keepChat();
  $("draft").focus();
}

async function rate(column, turn, rating) {
  const answer = turn.answers[column.id];
  if (answer.rating === rating) return;
  try {
    await call("preferences", {
      model: answer.model,
      messages: answer.messages,
      answer: answer.text,
      rating,
      settings: answer.settings,
    });
    answer.rating = rating;
    note("Saved to preferences.jsonl.");
  } catch (error) {
    note(`Not saved: ${error.message}`);
  }
  drawAnswer(column, turn);
  turn.bodies[column.id]?.querySelector(`.actions .${rating}`)?.focus();
  keepChat();
}

// --- copies

async function copy(text, done) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // no clipboard, as on a page that neither this machine nor HTTPS serves
    const field = element("textarea", {class: "unseen", "aria-hidden": "true"});
    field.value = text;
    document.body.append(field);
    field.select();
    const copied = document.execCommand("copy");
    field.remove();
    if (!copied) {
      note("This browser does not let the page copy.");
      return;
    }
  }
  note(done);
}

const requestOf = ({model, messages, settings: chosen}) => ({model, messages, ...chosen});
// Characters that a terminal obeys or that hide in a text are written as escapes.
const escapes = (text) =>
  text.replace(
    /[\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
    (one) => `\\u${one.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
const inShell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function asCurl(answer) {
  return (
    [
      `curl ${inShell(new URL("v1/chat/completions", location.href).href)}`,
      "-H 'Content-Type: application/json'",
      ...(apiKey ? ['-H "Authorization: Bearer $MINISFT_API_KEY"'] : []),
      `-d ${inShell(escapes(JSON.stringify(requestOf(answer))))}`,
    ].join(" \\\n  ") + "\n"
  );
}

// JSON is Python but for true, false and null, and its texts are Python's if no surrogate is escaped.
function inPython(value) {
  if (Array.isArray(value)) return `[${value.map(inPython).join(", ")}]`;
  if (value && typeof value === "object")
    return `{${Object.entries(value)
      .map(([key, one]) => `${inPython(key)}: ${inPython(one)}`)
      .join(", ")}}`;
  if (value === true || value === false) return value ? "True" : "False";
  return value === null || value === undefined ? "None" : escapes(JSON.stringify(value));
}

function asPython(answer) {
  const {messages, ...rest} = requestOf(answer);
  const lines = messages.map((message) => `        ${inPython(message)},\n`).join("");
  const others = Object.entries(rest)
    .map(([name, value]) => `    ${name}=${inPython(value)},\n`)
    .join("");
  return (
    `${apiKey ? "import os\n\n" : ""}from openai import OpenAI\n\n` +
    `client = OpenAI(base_url=${inPython(new URL("v1", location.href).href)}, api_key=${apiKey ? 'os.environ["MINISFT_API_KEY"]' : '"none"'})\n` +
    `reply = client.chat.completions.create(\n${others}    messages=[\n${lines}    ],\n)\nprint(reply.choices[0].message.content)\n`
  );
}

// One row of ShareGPT, as `data.source` reads it: what the last answer was asked, and that answer.
function rowOf(column) {
  const answer = turns
    .map((turn) => turn.answers[column.id])
    .filter(isAnswered)
    .at(-1);
  if (!answer) return null;
  const names = {system: "system", user: "human", assistant: "gpt"};
  const conversations = [...answer.messages, messageOf(answer)].map(({role, content, ...more}) => ({
    from: names[role],
    value: content,
    ...more,
  }));
  const time = new Date().toISOString().replace(/[-:]|\..*/g, "");
  return {id: `chat-${answer.model}-${time}`, conversations};
}

function saveRow(column) {
  const row = rowOf(column);
  if (!row) {
    note("There is no answer to save yet.");
    return;
  }
  const url = URL.createObjectURL(new Blob([JSON.stringify(row) + "\n"], {type: "application/x-ndjson"}));
  const link = element("a", {href: url, download: `${row.id.replace(/[^\w.-]/g, "_")}.jsonl`});
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

// --- what survives a reload of the page, in this tab only: never the key

const keep = (name, value) => {
  try {
    sessionStorage.setItem(name, JSON.stringify(value));
  } catch {
    /* full or forbidden */
  }
};
const kept = (name) => {
  try {
    return JSON.parse(sessionStorage.getItem(name)) ?? {};
  } catch {
    return {};
  }
};

function keepDraft() {
  const values = Object.fromEntries(["draft", "system", ...SETTINGS].map((name) => [name, $(name).value]));
  keep(STORE.draft, {...values, probabilities: $("probabilities").checked});
}

function keepChat() {
  if (!columns.length) return;
  const without = (answer) =>
    answer && {...answer, tokens: [], state: answer.state === "running" ? "stopped" : answer.state};
  keep(STORE.chat, {
    columns: columns.map((column) => column.model),
    turns: turns.map((turn) => ({
      question: turn.question,
      answers: columns.map((column) => without(turn.answers[column.id]) ?? null),
    })),
  });
}

function restoreDraft() {
  const draft = kept(STORE.draft);
  for (const name of ["draft", "system", ...SETTINGS]) if (typeof draft[name] === "string") $(name).value = draft[name];
  $("probabilities").checked = draft.probabilities === true;
}

function restoreChat() {
  const chat = kept(STORE.chat);
  const names = (chat.columns ?? []).filter((name) => models.includes(name));
  if (!names.length || names.length !== chat.columns.length) return; // another run is served here now
  columns = names.slice(0, MOST_COLUMNS).map(newColumn);
  turns = chat.turns.map(({question, answers}) => ({
    question,
    answers: Object.fromEntries(
      columns.map((column, place) => [column.id, answers[place]]).filter(([, answer]) => answer),
    ),
  }));
}

// --- start

function fitDraft() {
  $("draft").style.height = "auto";
  $("draft").style.height = `${$("draft").scrollHeight + 2}px`;
}

function showSettings() {
  for (const name of ["temperature", "top_p"]) $(`${name}-shown`).textContent = Number($(name).value).toFixed(2);
  $("legend").hidden = !$("probabilities").checked;
}

function openSettings(open) {
  document.body.classList.toggle("settings-open", open);
  $("show-settings").setAttribute("aria-expanded", String(open));
  $("show-settings").textContent = open ? "Close" : "Settings";
}

function listen() {
  for (const name of ["draft", "system", ...SETTINGS, "probabilities"])
    $(name).addEventListener("input", () => {
      showSettings();
      keepDraft();
    });
  $("draft").addEventListener("input", fitDraft);
  $("draft").addEventListener("keydown", (event) => {
    if (sends(event)) {
      event.preventDefault();
      send();
    }
  });
  $("probabilities").addEventListener("change", () =>
    turns.forEach((turn) => columns.forEach((column) => drawAnswer(column, turn))),
  );
  $("send").addEventListener("click", send);
  $("stop").addEventListener("click", () => {
    stop();
    $("draft").focus();
  });
  $("new").addEventListener("click", newChat);
  $("show-settings").addEventListener("click", () => openSettings(!document.body.classList.contains("settings-open")));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || $("key-dialog").open) return;
    hideTip();
    openSettings(false);
    stop();
  });
  $("key-use").addEventListener("click", () => $("key-dialog").close("use"));
  $("key-cancel").addEventListener("click", () => $("key-dialog").close("cancel"));
  $("key").addEventListener("keydown", (event) => {
    if (event.key === "Enter") $("key-dialog").close("use");
  });
  addEventListener("pagehide", () => {
    keepDraft();
    keepChat();
  });
  let from = null; // a swipe shows the model beside this one on a phone
  $("turns").addEventListener(
    "touchstart",
    ({touches}) => {
      from = touches.length === 1 ? [touches[0].clientX, touches[0].clientY] : null;
    },
    {passive: true},
  );
  $("turns").addEventListener(
    "touchend",
    ({changedTouches: [touch]}) => {
      if (!from || $("tabs").hidden) return;
      const across = touch.clientX - from[0],
        down = touch.clientY - from[1];
      if (Math.abs(across) > 60 && Math.abs(across) > 2 * Math.abs(down)) showColumn(shown - Math.sign(across));
    },
    {passive: true},
  );
}

async function start() {
  restoreDraft();
  showSettings();
  fitDraft();
  listen();
  $("draft").focus();
  try {
    models = (await (await call("v1/models")).json()).data.map((model) => model.id);
    if (!models.length) throw new ServerError("The server has no model.");
  } catch (error) {
    $("empty").replaceChildren(
      element("p", {class: "failure", role: "alert"}, error.message),
      button({onclick: () => location.reload()}, "Try again"),
    );
    return;
  }
  restoreChat();
  const first =
    ["final", ...models.filter((name) => name !== "base")].find((name) => models.includes(name)) ?? models[0];
  if (!columns.length) columns = [newColumn(first)];
  drawHeads();
  drawTurns();
  $("board").scrollTop = $("board").scrollHeight;
}

start();
