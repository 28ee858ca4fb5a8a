// The uploader: the files of one adapter, in chunks that resume where they stopped, by the REST API.
import { sha256 } from "./sha256.js";

const CHUNK_BYTES = 8 * 1024 * 1024;
const TRIES = 6;
const chosen = new Map(); // path -> File
const form = document.getElementById("upload");
const drop = document.getElementById("drop");
const list = document.getElementById("list");
const bar = document.getElementById("bar");
const word = document.getElementById("word");
const total = document.getElementById("total");
const problem = document.getElementById("problem");
const cancel = document.getElementById("cancel");
let stopping = null;

// Choosing -------------------------------------------------------------------------------------------------------

function take(path, file) {
  const name = path.replace(/^\/+/, "");
  if (name.split("/").some((part) => part.startsWith("."))) return;
  chosen.set(name, file);
}

function withoutRoot(paths) {
  const first = paths[0]?.split("/")[0];
  const shared = paths.length > 0 && paths.every((path) => path.includes("/") && path.split("/")[0] === first);
  return (path) => (shared ? path.split("/").slice(1).join("/") : path);
}

function takeAll(pairs) {
  const shorten = withoutRoot(pairs.map(([path]) => path));
  for (const [path, file] of pairs) take(shorten(path), file);
  show();
  read();
}

async function entries(entry, before = "") {
  if (entry.isFile) {
    const file = await new Promise((good, bad) => { entry.file(good, bad); });
    return [[before + entry.name, file]];
  }
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((good, bad) => { reader.readEntries(good, bad); });
    if (!some.length) break;
    for (const inner of some) found.push(...await entries(inner, `${before}${entry.name}/`));
  }
  return found;
}

function size(bytes) {
  return bytes < 1000 ? `${bytes} B` : bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} KB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

function show() {
  list.replaceChildren(...[...chosen].sort(([a], [b]) => (a < b ? -1 : 1)).map(([path, file]) => {
    const row = document.createElement("li");
    const name = document.createElement("span");
    name.textContent = `${path} (${size(file.size)})`;
    const remove = document.createElement("button");
    remove.type = "button";
    remove.className = "plain";
    remove.textContent = "Remove";
    remove.setAttribute("aria-label", `Remove ${path}`);
    remove.addEventListener("click", () => { chosen.delete(path); show(); read(); });
    row.append(name, remove);
    return row;
  }));
}

drop.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", async (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  const dropped = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const pairs = dropped.length
    ? (await Promise.all(dropped.map((entry) => entries(entry)))).flat()
    : [...event.dataTransfer.files].map((file) => [file.name, file]);
  takeAll(pairs);
});
for (const id of ["folder", "files"]) {
  document.getElementById(id).addEventListener("change", (event) => {
    takeAll([...event.target.files].map((file) => [file.webkitRelativePath || file.name, file]));
    event.target.value = "";
  });
}

const examples = () => form.elements.examples.value.split("\n").map((line) => line.trim()).filter(Boolean);

// What the files say goes to the preview where the form leaves it open.
async function read() {
  const config = chosen.get("adapter_config.json");
  const card = chosen.get("README.md");
  let base = "";
  try {
    if (config && config.size < 1e6) base = JSON.parse(await config.text()).base_model_name_or_path ?? "";
  } catch { /* The hub says what is wrong with it when it is uploaded. */ }
  form.elements.detected_base.value = base;
  form.elements.readme.value = card && card.size < 2e5 ? await card.text() : "";
  form.elements.readme.dispatchEvent(new Event("input", { bubbles: true }));
}

// Sending --------------------------------------------------------------------------------------------------------

class Problem extends Error {
  constructor(record) {
    super(record.detail);
    this.record = record;
  }
}

const token = () => form.elements.csrfmiddlewaretoken.value;
const wait = (ms) => new Promise((go) => { setTimeout(go, ms); });

async function call(method, url, body) {
  const response = await fetch(url, {
    method,
    headers: { "X-CSRFToken": token(), ...(body ? { "Content-Type": "application/json" } : {}) },
    body: body ? JSON.stringify(body) : undefined,
    signal: stopping.signal,
  });
  const answer = response.status === 204 ? null : await response.json();
  if (!response.ok) throw new Problem(answer);
  return answer;
}

function put(url, file, start, onProgress) {
  const end = Math.min(start + CHUNK_BYTES, file.size);
  return new Promise((good, bad) => {
    const request = new XMLHttpRequest();
    request.open("PUT", url);
    request.setRequestHeader("X-CSRFToken", token());
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.setRequestHeader("Content-Range", file.size ? `bytes ${start}-${end - 1}/${file.size}` : "bytes */0");
    request.upload.addEventListener("progress", (event) => onProgress(start + event.loaded));
    request.addEventListener("load", () => good(request));
    request.addEventListener("error", () => bad(new TypeError("The connection broke.")));
    request.addEventListener("abort", () => bad(new DOMException("Cancelled", "AbortError")));
    stopping.signal.addEventListener("abort", () => request.abort(), { once: true });
    request.send(file.slice(start, end));
  });
}

// Sends one file from where the hub says it stands; a broken connection is tried again with growing pauses.
async function send(upload, promised, file, onProgress) {
  let offset = promised.offset;
  let failures = 0;
  while (offset < file.size) {
    try {
      const request = await put(promised.url, file, offset, onProgress);
      if (request.status >= 200 && request.status < 300) {
        offset = Math.min(offset + CHUNK_BYTES, file.size);
        failures = 0;
      } else if (request.status === 416) {
        offset = JSON.parse(request.responseText).offset;
      } else if (request.status === 503 || request.status === 429 || request.status === 502) {
        throw new TypeError("The hub is busy.");
      } else {
        throw new Problem(JSON.parse(request.responseText));
      }
    } catch (error) {
      failures += 1;
      if (!(error instanceof TypeError) || failures > TRIES) throw error;
      word.textContent = `${error.message} Trying again …`;
      await wait(500 * 2 ** failures);
      const state = await call("GET", `/api/v1/uploads/${upload.id}`).catch(() => null);
      offset = state?.files.find((row) => row.path === promised.path)?.offset ?? offset;
    }
  }
  onProgress(file.size);
}

function explain(error) {
  const box = document.createElement("article");
  box.className = "problem";
  const first = document.createElement("p");
  first.textContent = error instanceof Problem ? `${error.record.title}. ${error.record.detail}` : error.message;
  box.append(first);
  const faults = error instanceof Problem ? error.record.errors ?? [] : [];
  if (faults.length) {
    const items = document.createElement("ul");
    for (const fault of faults) {
      const item = document.createElement("li");
      const parts = [fault.pointer && `${fault.pointer}:`, fault.met != null && `met ${JSON.stringify(fault.met)},`,
        fault.wanted != null && `wanted ${JSON.stringify(fault.wanted)}.`, fault.remedy];
      item.textContent = parts.filter(Boolean).join(" ");
      items.append(item);
    }
    box.append(items);
  }
  problem.replaceChildren(box);
  box.scrollIntoView({ block: "nearest" });
}

async function run() {
  const files = [...chosen];
  const bytes = files.reduce((sum, [, file]) => sum + file.size, 0) || 1;
  const promised = [];
  for (const [path, file] of files) {
    word.textContent = `Reading ${path} …`;
    promised.push({ path, size: file.size, sha256: await sha256(file) });
  }
  const field = (name) => form.elements[name].value.trim();
  const card = {};
  for (const name of ["description", "instruction", "base_model", "licence"]) if (field(name)) card[name] = field(name);
  if (examples().length) card.examples = examples();
  const compression = {};
  if (field("preset")) compression.preset = field("preset");
  // int4 keeps every value.
  if (field("density") && field("preset") !== "int4") compression.density = Number(field("density"));
  const upload = await call("POST", "/api/v1/uploads", {
    expert: `${field("owner")}/${field("name")}`,
    private: field("visibility") === "private",
    card,
    compression,
    files: promised,
  });
  let sent = 0;
  for (const row of upload.files) {
    const file = chosen.get(row.path);
    await send(upload, row, file, (done) => {
      bar.value = (sent + done) / bytes;
      word.textContent = `${row.path}: ${size(done)} of ${size(file.size)}`;
    });
    sent += file.size;
  }
  word.textContent = "Checking …";
  const made = await call("POST", `/api/v1/uploads/${upload.id}/complete`);
  window.location.assign(`/${made.expert}`);
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  problem.replaceChildren();
  if (!chosen.size) {
    explain(new Error("No files yet: drop the adapter's folder on the field above."));
    return;
  }
  stopping = new AbortController();
  total.hidden = false;
  cancel.hidden = false;
  form.elements.send.disabled = true;
  bar.value = 0;
  try {
    await run();
  } catch (error) {
    if (error.name === "AbortError") word.textContent = "Cancelled. Nothing was published.";
    else { explain(error); total.hidden = true; }
  } finally {
    form.elements.send.disabled = false;
    cancel.hidden = true;
  }
});
cancel.addEventListener("click", () => stopping?.abort());
