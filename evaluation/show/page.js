"use strict";

// ---- the recording

/* Reads what packing.py wrote: [{layer, heads, choices: [{position, isFull, toggled, dropped, returned}]}]. toggled:
   for each head the positions that are kept now and were not before, or the other way round; dropped: those that leave
   before the next choice, in order; returned: those kept now, not before, but at an earlier choice. */
function unpack(text) {
  const bytes = atob(text);
  let place = 0;
  function next() {
    let number = 0, factor = 1, byte;
    do {
      byte = bytes.charCodeAt(place++);
      number += (byte & 127) * factor;
      factor *= 128;
    } while (byte > 127);
    return number;
  }
  const layers = [];
  for (let count = next(); count > 0; count--) {
    const layer = next(), heads = next(), choices = [];
    const kept = Array.from({ length: heads }, () => new Set());
    const seen = Array.from({ length: heads }, () => new Set());
    let position = 0;
    for (let left = next(); left > 0; left--) {
      position += next();
      const choice = { position, isFull: next() === 1, toggled: [], dropped: [], returned: [] };
      for (let head = 0; head < heads; head++) {
        const toggled = [], dropped = [], returned = [];
        let at = 0;
        for (let more = next(); more > 0; more--) {
          at += next();
          toggled.push(at);
          if (kept[head].delete(at)) continue;
          kept[head].add(at);
          if (seen[head].has(at)) returned.push(at);
          seen[head].add(at);
        }
        for (let more = next(); more > 0; more--) dropped.push(next());
        choice.toggled.push(toggled);
        choice.dropped.push(dropped);
        choice.returned.push(returned);
      }
      choices.push(choice);
    }
    layers.push({ layer, heads, choices });
  }
  return layers;
}

/* What one head of one layer holds at a position. Moving from choice to choice toggles positions, forwards or back. */
class Holder {
  constructor(layer, head, budget, length) {
    this.layer = layer;
    this.head = head;
    this.budget = budget;
    this.chosen = new Uint8Array(length); // 1: kept at the choice
    this.size = 0; // how many
    this.index = -1; // of the choice
  }

  /* The choice at or before a position. */
  choiceAt(position) {
    const choices = this.layer.choices;
    let low = 0, high = choices.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (choices[middle].position <= position) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  toggle(index) {
    for (const position of this.layer.choices[index].toggled[this.head]) {
      this.chosen[position] ^= 1;
      this.size += this.chosen[position] ? 1 : -1;
    }
  }

  /* Fills held (one byte a position: 1 held, 2 came back at this very step); returns how many are held. */
  fill(position, held) {
    const wanted = this.choiceAt(position);
    while (this.index < wanted) this.toggle(++this.index);
    while (this.index > wanted) this.toggle(this.index--);
    held.set(this.chosen);
    const choice = this.layer.choices[wanted], since = position - choice.position;
    if (since === 0) {
      for (const back of choice.returned[this.head]) held[back] = 2;
      return this.size;
    }
    const gone = Math.min(this.size, Math.max(0, this.size + since - 1 - this.budget));
    for (const dropped of choice.dropped[this.head].slice(0, gone)) held[dropped] = 0;
    const first = Math.max(choice.position + 1, position - this.budget);
    held.fill(1, first, position + 1);
    return this.size - gone + position + 1 - first;
  }
}

/* "full", "selecting" or "partial": what the step at a position was in a layer. */
function kindOf(layer, position) {
  const choice = layer.choices.find((own) => own.position === position);
  return choice ? (choice.isFull ? "full" : "selecting") : "partial";
}

/* All that the page and its tests count with. */
function read(data) {
  const layers = unpack(data.choices), length = data.texts.length;
  const holders = layers.flatMap((layer) =>
    Array.from({ length: layer.heads }, (_, head) => new Holder(layer, head, data.budget, length)));
  return {
    layers, holders, length,
    first: data.promptLength - 1,
    last: length - 2,
    choices: [...new Set(layers.flatMap((layer) => layer.choices.map((own) => own.position)))].sort((a, b) => a - b),
    held(layer, head, position) {
      const held = new Uint8Array(length);
      holders.find((own) => own.layer.layer === layer && own.head === head).fill(position, held);
      return Array.from(held.keys()).filter((at) => held[at]);
    },
  };
}

// ---- the page

function show(data) {
  const recording = read(data), { layers, holders, first, last, length } = recording;
  const find = (id) => document.getElementById(id);
  const slider = find("step"), layerChoice = find("layer"), headChoice = find("head");
  const held = holders.map(() => new Uint8Array(length));
  let counts = [], timer = null;

  find("title").textContent = data.title;
  find("settings").textContent = Object.entries(data.settings).map(([name, value]) => `${name} ${value}`).join(" · ");
  Object.assign(slider, { min: first, max: last, value: first });
  const option = (value, text) => Object.assign(document.createElement("option"), { value, textContent: text });
  layerChoice.append(option("", "all"), ...layers.map((own) => option(own.layer, own.layer)));
  const heads = Math.max(...layers.map((own) => own.heads));
  headChoice.append(option("", "all"), ...Array.from({ length: heads }, (_, head) => option(head, head)));
  const spans = data.texts.map((text, at) => {
    const span = document.createElement("span");
    span.textContent = text.replace(/\n/g, "⏎\n");
    if (at >= data.promptLength) span.classList.add("generated");
    return span;
  });
  find("text").append(...spans);

  const position = () => Number(slider.value);
  const inView = () => holders.map((_, i) => i).filter((i) =>
    (layerChoice.value === "" || holders[i].layer.layer === Number(layerChoice.value)) &&
    (headChoice.value === "" || holders[i].head === Number(headChoice.value)));
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function draw() {
    counts = holders.map((holder, i) => holder.fill(position(), held[i]));
    const shown = inView();
    drawText(shown);
    drawMap(shown);
    drawSteps();
    drawState(shown);
  }

  function drawText(shown) {
    const now = position(), kept = color("--kept");
    spans.forEach((span, at) => {
      let share = 0, back = 0;
      for (const i of shown) {
        share += held[i][at] ? 1 : 0;
        back += held[i][at] === 2 ? 1 : 0;
      }
      share /= shown.length || 1;
      span.style.background = share ? `rgba(${kept}, ${0.1 + 0.65 * share})` : "";
      span.classList.toggle("back", back > 0);
      span.classList.toggle("now", at === now);
      span.classList.toggle("later", at > now);
      span.title = `${at}: held by ${Math.round(share * shown.length)} of ${shown.length}` + (back ? `, came back in ${back}` : "");
    });
  }

  function drawMap(shown) {
    const canvas = find("map"), wide = Math.min(length, 2400), high = Math.max(2, Math.min(8, Math.floor(480 / holders.length)));
    Object.assign(canvas, { width: wide, height: holders.length * high });
    const pen = canvas.getContext("2d"), pixels = pen.createImageData(wide, holders.length * high);
    const [kept, back] = ["--kept", "--back"].map((name) => (color(name).match(/[\d.]+/g) || []).map(Number));
    const visible = new Set(shown);
    holders.forEach((_, i) => {
      for (let x = 0; x < wide; x++) {
        const from = Math.floor(x * length / wide), to = Math.max(from + 1, Math.floor((x + 1) * length / wide));
        let full = 0, came = false;
        for (let at = from; at < to; at++) {
          full += held[i][at] ? 1 : 0;
          came = came || held[i][at] === 2;
        }
        if (!full) continue;
        const paint = came ? back : kept, alpha = (visible.has(i) ? 255 : 90) * (0.3 + 0.7 * full / (to - from));
        for (let y = i * high; y < (i + 1) * high - (high > 3 ? 1 : 0); y++)
          pixels.data.set([...paint, alpha], 4 * (y * wide + x));
      }
    });
    pen.putImageData(pixels, 0, 0);
  }

  function drawSteps() {
    const canvas = find("steps"), steps = last - first + 1;
    const high = Math.max(4, Math.min(14, Math.floor(200 / layers.length))), wide = Math.max(1, Math.floor(2400 / steps));
    Object.assign(canvas, { width: steps * wide, height: layers.length * high });
    const pen = canvas.getContext("2d"), colors = Object.fromEntries(["full", "selecting", "partial"].map((kind) => [kind, color(`--${kind}`)]));
    layers.forEach((layer, row) => {
      const kinds = new Map(layer.choices.map((own) => [own.position, own.isFull ? "full" : "selecting"]));
      for (let at = first; at <= last; at++) {
        pen.fillStyle = colors[kinds.get(at) || "partial"];
        pen.fillRect((at - first) * wide, row * high, wide - (wide > 3 ? 1 : 0), high - (high > 3 ? 1 : 0));
      }
    });
    pen.strokeStyle = `rgb(${color("--back")})`;
    pen.lineWidth = 4;
    pen.strokeRect((position() - first) * wide, 0, Math.max(4, wide), canvas.height);
  }

  function drawState(shown) {
    const now = position(), sum = shown.reduce((total, i) => total + counts[i], 0), mean = sum / (shown.length || 1);
    const kinds = { full: 0, selecting: 0, partial: 0 };
    const seen = layers.filter((own) => layerChoice.value === "" || own.layer === Number(layerChoice.value));
    seen.forEach((own) => kinds[kindOf(own, now)]++);
    const back = shown.reduce((total, i) => total + held[i].reduce((own, value) => own + (value === 2 ? 1 : 0), 0), 0);
    const where = now === first ? "the prompt's end" : `step ${now - first} of ${last - first}`;
    const layersOf = Object.entries(kinds).filter(([, count]) => count).map(([kind, count]) => `${kind} in ${count}`).join(", ");
    find("state").textContent =
      `${where[0].toUpperCase()}${where.slice(1)}: token ${now}, ${JSON.stringify(data.texts[now])} leads to ${JSON.stringify(data.texts[now + 1])}. ` +
      `${layersOf} of ${seen.length} layers in view. They hold ${mean.toFixed(1)} of ${now + 1} tokens for each head ` +
      `(${(100 * mean / (now + 1)).toFixed(1)} %), ${sum} in all; ${back} came back.`;
    find("state").dataset.held = sum;
  }

  function move(to) {
    slider.value = Math.max(first, Math.min(last, to));
    draw();
    const box = find("text"), span = spans[position()], top = span.offsetTop - box.offsetTop;
    if (top < box.scrollTop || top > box.scrollTop + box.clientHeight - 60) box.scrollTop = top - box.clientHeight / 2;
  }

  function nextChoice(forwards) {
    const now = position(), own = recording.choices;
    const to = forwards ? own.find((at) => at > now) : own.findLast((at) => at < now);
    if (to !== undefined) move(to);
  }

  function play() {
    if (timer === null && position() === last) move(first);
    timer = timer === null ? setInterval(() => (position() < last ? move(position() + 1) : play()), 150) : clearInterval(timer) || null;
    find("play").textContent = timer === null ? "Play" : "Pause";
    find("play").setAttribute("aria-pressed", timer !== null);
  }

  const share = (event, canvas) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map((at) => Math.max(0, Math.min(0.999, at)));
  };
  find("steps").addEventListener("click", (event) => {
    const [x, y] = share(event, find("steps"));
    layerChoice.value = layers[Math.floor(y * layers.length)].layer;
    move(first + Math.floor(x * (last - first + 1)));
  });
  find("map").addEventListener("click", (event) => {
    const chosen = holders[Math.floor(share(event, find("map"))[1] * holders.length)];
    Object.assign(layerChoice, { value: chosen.layer.layer });
    Object.assign(headChoice, { value: chosen.head });
    draw();
  });
  find("map").addEventListener("mousemove", (event) => {
    const under = holders[Math.floor(share(event, find("map"))[1] * holders.length)];
    find("map").title = `layer ${under.layer.layer}, head ${under.head}; click to see it alone`;
  });
  slider.addEventListener("input", () => move(position()));
  for (const element of [layerChoice, headChoice]) element.addEventListener("input", draw);
  find("play").addEventListener("click", play);
  find("before").addEventListener("click", () => nextChoice(false));
  find("after").addEventListener("click", () => nextChoice(true));
  document.addEventListener("keydown", (event) => {
    if (event.target.tagName === "SELECT" || !["ArrowLeft", "ArrowRight", " "].includes(event.key)) return;
    if (event.key === " " && event.target.tagName === "BUTTON") return;
    event.preventDefault();
    if (event.key === " ") play();
    else if (event.shiftKey) nextChoice(event.key === "ArrowRight");
    else move(position() + (event.key === "ArrowRight" ? 1 : -1));
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  const wanted = new URLSearchParams(location.hash.slice(1)); // such as #step=12&layer=3&head=0
  if (wanted.has("layer")) layerChoice.value = wanted.get("layer");
  if (wanted.has("head")) headChoice.value = wanted.get("head");
  move(first + Number(wanted.get("step") || 0));
}

if (typeof document !== "undefined") show(JSON.parse(document.getElementById("data").textContent));
