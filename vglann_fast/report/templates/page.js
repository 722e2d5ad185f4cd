// One clock moves every filmstrip of the page, so that a clip, its reconstruction and its streams stay in step.
(() => {
  "use strict";

  const FRAMES_PER_SECOND = 24;
  const find = (id) => document.getElementById(id);
  const [play, slider, position, speed, crisp] = ["play", "frame", "position", "speed", "crisp"].map(find);
  const onScreen = new Set();
  const players = new Map();
  let time = 0; // in frames
  let shown = -1;
  let last = null;
  let playing = false;

  function start(view) {
    const image = view.querySelector("img");
    const [width, height] = view.dataset.size.split(" ").map(Number);
    const [cellWidth, cellHeight, margin] = view.dataset.cell.split(" ").map(Number);
    const canvas = document.createElement("canvas");
    canvas.width = width;
    canvas.height = height;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", image.alt);
    const context = canvas.getContext("2d");
    const frames = Number(view.dataset.frames);
    const columns = Number(view.dataset.columns);
    const draw = (at) => {
      const i = at % frames;
      const left = (i % columns) * cellWidth + margin;
      const top = Math.floor(i / columns) * cellHeight + margin;
      context.drawImage(image, left, top, width, height, 0, 0, width, height);
    };
    // The still picture stays until there is a frame to put in its place.
    image.decode().then(() => {
      players.set(view, draw);
      draw(Math.max(shown, 0));
      view.append(canvas);
      image.hidden = true;
    }, () => {});
    return frames;
  }

  function show(frame) {
    if (frame === shown) return;
    shown = frame;
    for (const view of onScreen) players.get(view)?.(frame);
    slider.value = String(frame + 1);
    position.textContent = `${frame + 1} / ${total}`;
  }

  function tick(now) {
    if (!playing) return;
    // A tab that was in the background goes on where it stopped.
    const passed = last === null ? 0 : Math.min((now - last) / 1000, 0.25);
    last = now;
    time = (time + passed * FRAMES_PER_SECOND * Number(speed.value)) % total;
    show(Math.floor(time));
    requestAnimationFrame(tick);
  }

  function setPlaying(value) {
    playing = value;
    last = null;
    document.body.classList.toggle("playing", value);
    play.querySelector("span").textContent = value ? "Pause" : "Play";
    if (value) requestAnimationFrame(tick);
  }

  function seek(frame) {
    setPlaying(false);
    time = (frame + total) % total;
    show(time);
  }

  const views = [...document.querySelectorAll(".view[data-frames]")];
  const total = Math.max(1, ...views.map(start));

  // Only what can be seen is drawn; the margin hides the catching up.
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) {
        onScreen.add(target);
        players.get(target)?.(Math.max(shown, 0));
      } else onScreen.delete(target);
    }
  }, { rootMargin: "300px" });
  views.forEach((view) => watcher.observe(view));

  if (views.length) {
    document.querySelector(".player").hidden = false;
    slider.max = String(total);
    show(0);
    play.addEventListener("click", () => setPlaying(!playing));
    slider.addEventListener("input", () => seek(Number(slider.value) - 1));
    crisp.addEventListener("change", () => document.body.classList.toggle("sharp", crisp.checked));
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const tag = event.target.tagName;
      // Controls keep their own keys: space presses a button, arrows move the slider and the menu.
      if (event.key === " " && !["BUTTON", "SELECT", "SUMMARY", "A"].includes(tag) && event.target !== crisp) {
        setPlaying(!playing);
      } else if (event.key === "ArrowRight" && !["INPUT", "SELECT"].includes(tag)) seek(shown + 1);
      else if (event.key === "ArrowLeft" && !["INPUT", "SELECT"].includes(tag)) seek(shown - 1);
      else return;
      event.preventDefault();
    });
    setPlaying(!matchMedia("(prefers-reduced-motion: reduce)").matches);
  }

  // Charts read out the points under the pointer.
  for (const chart of document.querySelectorAll(".chart")) {
    const make = (name, parent) => parent.appendChild(document.createElementNS(chart.namespaceURI, name));
    const lines = [...chart.querySelectorAll("polyline")].map((line) => ({
      label: line.dataset.label,
      points: [...line.points].map(({ x, y }) => ({ x, y })),
      values: line.dataset.values.split(",").map((pair) => pair.split(" ")),
    }));
    if (!lines.length) continue; // bars: their values are written beside them
    const layer = make("g", chart);
    chart.addEventListener("pointerleave", () => layer.replaceChildren());
    chart.addEventListener("pointermove", (event) => {
      const { x } = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
      layer.replaceChildren();
      const rows = lines.map(({ label, points, values }) => {
        let nearest = 0;
        points.forEach((point, i) => {
          if (Math.abs(point.x - x) < Math.abs(points[nearest].x - x)) nearest = i;
        });
        return { label, at: points[nearest], value: values[nearest] };
      });
      const { at } = rows[0];
      const { width, height } = chart.viewBox.baseVal;
      const cursor = make("line", layer);
      const ends = { class: "cursor", x1: at.x, x2: at.x, y1: 12, y2: height - 38 };
      for (const [key, value] of Object.entries(ends)) cursor.setAttribute(key, value);
      rows.forEach(({ label, value }, i) => {
        const text = make("text", layer);
        const left = at.x > width / 2;
        const place = { class: "readout", x: at.x + (left ? -6 : 6), y: 22 + 14 * i };
        for (const [key, v] of Object.entries(place)) text.setAttribute(key, v);
        text.setAttribute("text-anchor", left ? "end" : "start");
        text.textContent = `${label} ${value[1]} at ${value[0]}`;
      });
    });
  }
})();
