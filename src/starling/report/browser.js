"use strict";
/* The list of questions. Whatever a file holds becomes text nodes: nothing is parsed as HTML. */

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const NUM_KEYS = 7; // colours in style.css

/* Marks that change or hide what stands beside them are written out. */
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g;
function visible(text) {
  return text.replace(HIDDEN, (mark) => {
    const code = mark.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");
    return mark === "\r" ? "" : "\u27e8U+" + code + "\u27e9";
  });
}

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = visible(text);
  return made;
}

const letter = (index) => (index < 26 ? String.fromCharCode(65 + index) : String(index + 1));
const key = (index) => element("span", "key key" + (index % NUM_KEYS), letter(index));
const short = (score) => (score === null ? "\u2013" : String(Math.round(score * 10) / 10));

/* Each question with what it is searched, filtered and sorted by. */
function measured(question, place) {
  const turns = question.answers.flat();
  const scores = turns.map((turn) => turn.score).filter((score) => score !== null);
  const spread = question.turns.map((_, number) => {
    const own = question.answers.map((turns) => turns[number] && turns[number].score);
    const known = own.filter((score) => typeof score === "number");
    return known.length > 1 ? Math.max(...known) - Math.min(...known) : 0;
  });
  // Gold is 0 to 1 and scores are 1 to 10.
  const gaps = turns
    .filter((turn) => turn.score !== null && turn.gold !== null)
    .map((turn) => Math.abs(turn.score - (1 + 9 * turn.gold)));
  const said = turns.flatMap((turn) => [turn.answer || "", ...turn.judgments.flat()]);
  return {
    question,
    place,
    scores,
    apart: Math.max(0, ...spread),
    gold: Math.max(0, ...gaps),
    failed: turns.length - scores.length,
    lowest: Math.min(...scores, Infinity),
    highest: Math.max(...scores, -Infinity),
    words: [question.id, question.category, ...question.turns, ...said].join("\n").toLowerCase(),
  };
}

function meanScore(turns) {
  const known = turns.map((turn) => turn.score).filter((score) => score !== null);
  return known.length ? known.reduce((sum, score) => sum + score, 0) / known.length : null;
}

/* One line of the list: a button, and below it the answers once it was opened. */
function listed(entry) {
  const { question } = entry;
  const article = element("article", "question");
  const row = element("button", "row");
  row.type = "button";
  row.setAttribute("aria-expanded", "false");
  row.append(element("span", "where", question.id + " " + question.category));
  const snippet = element("span", "snippet", question.turns[0]);
  snippet.dir = "auto";
  const scores = element("span", "scores");
  question.answers.forEach((turns, index) => {
    const score = element("span");
    score.append(key(index), " " + short(meanScore(turns)));
    score.title = visible(data.models[index]);
    scores.append(score);
  });
  row.append(snippet, scores);
  const heading = element("h3");
  heading.append(row);
  article.append(heading);
  row.addEventListener("click", () => toggle(entry));
  return Object.assign(entry, { article, row, detail: null });
}

function toggle(entry, open = entry.row.getAttribute("aria-expanded") === "false") {
  if (open && !entry.detail) {
    entry.detail = detailOf(entry.question);
    entry.article.append(entry.detail);
  }
  if (entry.detail) entry.detail.hidden = !open;
  entry.row.setAttribute("aria-expanded", String(open));
}

function detailOf(question) {
  const detail = element("div", "detail");
  question.turns.forEach((asked, number) => {
    detail.append(element("h4", "", "Turn " + (number + 1)));
    detail.append(said(asked, "asked"));
    const answers = element("div", "answers");
    question.answers.forEach((turns, index) => {
      answers.append(card(turns[number], index));
    });
    detail.append(answers);
  });
  return detail;
}

function said(text, name) {
  const made = element("p", "said " + name, text);
  made.dir = "auto";
  return made;
}

function card(turn, index) {
  const made = element("section", "answer");
  const heading = element("h5");
  heading.append(key(index), element("bdi", "", data.models[index]));
  made.append(heading);
  if (!turn) {
    heading.append(element("span"));
    made.append(element("p", "missing", "It was not asked this."));
    return made;
  }
  const gold = turn.gold === null ? "" : ", gold " + turn.gold.toFixed(2);
  const score = turn.score === null ? "no score" : short(turn.score) + " of 10";
  heading.append(element("span", "", score + gold));
  if (turn.answer === null) made.append(element("p", "missing", "The folder holds no answer."));
  else if (turn.answer.trim() === "") made.append(element("p", "missing", "An empty answer."));
  else made.append(said(turn.answer, ""));
  for (const [label, text] of turn.judgments) {
    const judgment = element("details", "judgment");
    judgment.open = true;
    judgment.append(element("summary", "", "Judge: " + label));
    judgment.append(text ? said(text, "") : element("p", "missing", "No words were kept."));
    made.append(judgment);
  }
  if (!turn.judgments.length) made.append(element("p", "judgment missing", "Not judged."));
  return made;
}

const entries = data.questions.map(measured).map(listed);
let shown = entries;

function matches(entry) {
  const words = byId("search").value.toLowerCase().split(/\s+/);
  const category = byId("category").value;
  const low = byId("from").value === "" ? -Infinity : Number(byId("from").value);
  const high = byId("to").value === "" ? Infinity : Number(byId("to").value);
  const [what, least] = byId("show").value.split(" ");
  return (
    words.every((word) => entry.words.includes(word)) &&
    (category === "" || entry.question.category === category) &&
    ((low === -Infinity && high === Infinity) ||
      entry.scores.some((score) => low <= score && score <= high)) &&
    (!what || entry[what] >= Number(least))
  );
}

function sorted(found) {
  const by = byId("order").value;
  const rising = by === "place" || by === "lowest" ? 1 : -1;
  return [...found].sort((a, b) => {
    return a[by] === b[by] ? a.place - b.place : rising * (a[by] < b[by] ? -1 : 1);
  });
}

function update() {
  shown = sorted(entries.filter(matches));
  byId("questions").replaceChildren(...shown.map((entry) => entry.article));
  const all = entries.length;
  byId("count").textContent = shown.length
    ? shown.length + " of " + all + " questions"
    : "None of " + all + " questions fits. Esc in the search, or Reset, shows them again.";
}

function focusNext(steps) {
  const at = shown.findIndex((entry) => entry.article.contains(document.activeElement));
  const next = at < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, at + steps));
  if (!shown.length) return;
  shown[next].row.focus();
  shown[next].row.scrollIntoView({ block: "nearest" });
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const at = document.activeElement;
  const isTyping = at.matches("input, select, textarea");
  const isInList = byId("questions").contains(at);
  const entry = shown.find((each) => each.article.contains(at));
  if (event.key === "Escape" && at === byId("search")) {
    at.value = "";
    update();
    focusNext(0);
  } else if (event.key === "Escape" && entry) {
    toggle(entry, false);
    entry.row.focus();
  } else if (isTyping) {
    return;
  } else if (event.key === "/") {
    byId("search").focus();
    byId("search").select();
  } else if (event.key === "j" || (event.key === "ArrowDown" && isInList)) {
    focusNext(1);
  } else if (event.key === "k" || (event.key === "ArrowUp" && isInList)) {
    focusNext(-1);
  } else {
    return;
  }
  event.preventDefault();
}

function prepare() {
  const legend = data.models.map((name, index) => {
    const line = element("li");
    line.append(key(index), element("bdi", "", name));
    return line;
  });
  byId("legend").append(...legend);
  const categories = [...new Set(data.questions.map((question) => question.category))];
  for (const category of categories) {
    const option = element("option", "", category);
    option.value = category;
    byId("category").append(option);
  }
  const hasGold = entries.some((entry) => entry.question.answers.flat().some((t) => t.gold !== null));
  const unfit = (value) => (/^gold/.test(value) && !hasGold) || (/^apart/.test(value) && data.models.length < 2);
  for (const option of document.querySelectorAll("#show option, #order option")) {
    if (unfit(option.value)) option.remove();
  }
  byId("tools").addEventListener("input", update);
  byId("tools").addEventListener("submit", (event) => event.preventDefault());
  byId("tools").addEventListener("reset", () => setTimeout(update));
  byId("open").addEventListener("click", () => shown.forEach((entry) => toggle(entry, true)));
  byId("close").addEventListener("click", () => shown.forEach((entry) => toggle(entry, false)));
  document.addEventListener("keydown", pressed);
  byId("browser").hidden = false;
  update();
}

prepare();
