// One rater's way through the pairs. Served, answers go to the server; as a file, they stay in the browser until
// the rater downloads them.
(() => {
  "use strict";

  const find = (id) => document.getElementById(id);
  const study = JSON.parse(find("study").textContent);
  const served = study.videos === null;
  const memory = `vglann-study-${study.id}`;
  const sides = ["left", "right"];
  const videos = Object.fromEntries(sides.map((side) => [side, find(side).querySelector("video")]));
  let rater, answers, pair; // answers: trial -> {chosen, side}
  let state = "loading"; // then "watching" until both videos were seen to their end, "choosing", "storing"
  let downloaded = false;
  let again = null; // what "Try again" does
  const loading = new Map(); // video id -> promise of its address

  // ---- the rater: a random number; what this browser remembers may be refused it

  function recall() {
    try {
      return JSON.parse(localStorage.getItem(memory));
    } catch {
      return null;
    }
  }

  function remember() {
    try {
      localStorage.setItem(memory, JSON.stringify({ rater, answers: served ? {} : answers }));
    } catch { /* a reload starts anew */ }
  }

  function newRater() {
    const bytes = crypto.getRandomValues(new Uint8Array(8));
    rater = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
    answers = {};
    remember();
  }

  // FNV-1a with a final mix: orders the trials and mirrors the sides by rater, the same after a reload.
  function hash(text) {
    let h = 0x811c9dc5;
    for (let i = 0; i < text.length; i++) h = Math.imul(h ^ text.charCodeAt(i), 0x01000193);
    h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
    h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
    return (h ^ (h >>> 16)) >>> 0;
  }

  function remaining() {
    const order = study.trials.map((trial) => [hash(rater + trial[0]), trial]).sort(([a], [b]) => a - b);
    const mirrored = hash(rater) & 1;
    return order
      .map(([, [trial, a, b]]) => ({ trial, left: mirrored ? b : a, right: mirrored ? a : b }))
      .filter(({ trial }) => !(trial in answers));
  }

  // ---- the server, or the page itself

  async function ask(path, options) {
    const response = await fetch(path, options);
    if (!response.ok) throw new Error((await response.text()).slice(0, 300));
    return response;
  }

  async function load(id) {
    const blob = served
      ? await (await ask(`videos/${id}`)).blob()
      : new Blob([Uint8Array.from(atob(study.videos[id]), (c) => c.charCodeAt(0))], { type: "video/mp4" });
    return URL.createObjectURL(blob);
  }

  function address(id) {
    if (!loading.has(id)) loading.set(id, load(id).catch((error) => { loading.delete(id); throw error; }));
    return loading.get(id);
  }

  async function forget(id) {
    const promise = loading.get(id);
    loading.delete(id);
    URL.revokeObjectURL(await promise);
  }

  async function store(trial, answer) {
    if (served) {
      const body = JSON.stringify({ rater, trial, ...answer });
      await ask("answers", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    }
    answers[trial] = answer;
    remember();
  }

  // ---- what is on the screen

  function show(name) {
    for (const section of ["start", "trial", "done", "trouble"]) find(section).hidden = section !== name;
  }

  async function attempt(work) {
    try {
      await work();
    } catch (error) {
      again = work;
      find("reason").textContent = `${error.message} Your answers so far are kept.`;
      show("trouble");
    }
  }

  function setState(value) {
    state = value;
    for (const side of sides) find(side).disabled = value !== "choosing";
    if (value === "loading") find("hint").textContent = "Watch both once, then choose.";
    if (value === "choosing") find("hint").textContent = "Which looks more like a real recording?";
  }

  function count() {
    const answered = Object.keys(answers).length;
    find("bar").max = study.trials.length;
    find("bar").value = answered;
    find("count").textContent = `${answered} of ${study.trials.length}`;
  }

  async function start() {
    const known = recall();
    if (known === null) newRater();
    else ({ rater, answers } = known);
    if (served) answers = await (await ask(`answers/${rater}`)).json();
    count();
    if (!remaining().length) {
      finish();
      return;
    }
    find("begin").textContent = Object.keys(answers).length ? "Continue" : "Begin";
    show("start");
    find("begin").focus();
  }

  async function next() {
    count();
    const [now, later] = remaining();
    if (now === undefined) {
      finish();
      return;
    }
    setState("loading");
    pair = now;
    for (const side of sides) find(side).classList.remove("chosen");
    const addresses = await Promise.all(sides.map((side) => address(pair[side])));
    show("trial");
    await Promise.all(sides.map((side, i) => new Promise((resolve, reject) => {
      videos[side].oncanplaythrough = resolve;
      videos[side].onerror = () => reject(new Error("This browser cannot play the videos."));
      videos[side].src = addresses[i];
    })));
    setState("watching");
    play();
    if (later) for (const side of sides) address(later[side]).catch(() => {}); // asked for again when it is shown
  }

  // Both from their first frame at the same time, and again when both have ended.
  function play() {
    for (const side of sides) {
      videos[side].currentTime = 0;
      videos[side].play().catch(() => {}); // put off by the browser, or by the next pair
    }
  }

  function ended() {
    if (!sides.every((side) => videos[side].ended)) return;
    if (state === "watching") setState("choosing");
    play();
  }

  async function choose(side) {
    if (state !== "choosing") return;
    setState("storing");
    find(side).classList.add("chosen");
    const { trial, left, right } = pair;
    await attempt(async () => {
      await store(trial, { chosen: pair[side], side });
      forget(left);
      forget(right);
      await next();
    });
  }

  function finish() {
    for (const id of ["send", "download"]) find(id).hidden = served;
    find("another").hidden = !served && !downloaded; // it forgets the answers before
    show("done");
  }

  function download() {
    const list = Object.entries(answers).map(([trial, answer]) => ({ trial, ...answer }));
    const content = { format: "vglann-study-answers", version: 1, study: study.id, rater, answers: list };
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(content)], { type: "application/json" }));
    link.download = `answers-${rater}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    downloaded = true;
    finish();
  }

  for (const side of sides) {
    find(side).addEventListener("click", () => choose(side));
    videos[side].addEventListener("ended", ended);
  }
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || find("trial").hidden) return;
    if (event.key === "ArrowLeft") choose("left");
    else if (event.key === "ArrowRight") choose("right");
    else return;
    event.preventDefault();
  });
  find("begin").addEventListener("click", () => attempt(next));
  find("download").addEventListener("click", download);
  find("retry").addEventListener("click", () => attempt(again));
  find("another").addEventListener("click", () => {
    downloaded = false;
    newRater();
    attempt(start);
  });
  attempt(start);
})();
