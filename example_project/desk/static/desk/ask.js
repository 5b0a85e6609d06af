// Streams the answer into the page. Without this file the form is an ordinary post.
"use strict";

(() => {
  const form = document.getElementById("ask-form");
  const parts = Object.fromEntries(
    ["ask-button", "stop-button", "ask-status", "result", "answer", "note", "receipt", "refusal", "strip"].map(
      (id) => [id, document.getElementById(id)],
    ),
  );
  let reading = null; // the AbortController of the answer being read

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!reading) {
      ask();
    }
  });
  parts["stop-button"].addEventListener("click", () => reading?.abort());
  // Leaving ends the request by itself; a page kept for the Back button would read on.
  window.addEventListener("pagehide", () => reading?.abort());

  async function ask() {
    reading = new AbortController();
    const { signal } = reading;
    begin();
    try {
      const response = await fetch(form.dataset.stream, {
        method: "POST",
        body: new FormData(form),
        headers: { Accept: "application/x-ndjson" },
        signal,
      });
      if (response.ok && !response.redirected) {
        await readLines(response.body, show);
      } else {
        await explain(response);
      }
    } catch (error) {
      note(
        error.name === "AbortError"
          ? "Stopped. What it cost until here is on your usage page."
          : "The connection broke. What it cost until here is on your usage page.",
      );
    } finally {
      reading = null;
      end();
      // A server notices at its next write that its reader has left, and books the call then.
      setTimeout(refreshStrip, signal.aborted ? 1500 : 0);
    }
  }

  function begin() {
    parts.answer.textContent = "";
    parts.receipt.replaceChildren();
    parts.refusal.replaceChildren();
    parts.note.hidden = true;
    parts.result.hidden = false;
    parts["stop-button"].hidden = false;
    parts["ask-button"].disabled = true;
    parts["ask-status"].textContent = "Writing …";
    parts.answer.setAttribute("aria-busy", "true");
  }

  function end() {
    const focused = document.activeElement === parts["stop-button"];
    parts["stop-button"].hidden = true;
    parts["ask-button"].disabled = false;
    parts["ask-status"].textContent = "";
    parts.answer.removeAttribute("aria-busy");
    if (focused) {
      parts["ask-button"].focus();
    }
  }

  async function readLines(stream, each) {
    const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) {
        return;
      }
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      lines.forEach((line) => each(JSON.parse(line)));
    }
  }

  function show(line) {
    if (line.text !== undefined) {
      parts.answer.append(line.text);
    } else if (line.receipt !== undefined) {
      insert(parts.receipt, line.receipt);
    } else if (line.error !== undefined) {
      note(line.error);
    }
  }

  // HTML of this site's own templates, in which Django has escaped all data.
  function insert(element, html) {
    const holder = document.createElement("template");
    holder.innerHTML = html;
    element.replaceChildren(holder.content);
  }

  function note(text) {
    parts.note.textContent = text;
    parts.note.hidden = false;
  }

  async function explain(response) {
    if (response.redirected || response.status === 403) {
      window.location.reload(); // signed out meanwhile
    } else if (response.status === 429) {
      parts.result.hidden = true;
      insert(parts.refusal, await response.text());
    } else if (response.status === 400) {
      note(Object.values((await response.json()).errors).flat().map((error) => error.message).join(" "));
    } else {
      note("No answer came back. Try again in a moment.");
    }
  }

  async function refreshStrip() {
    const response = await fetch(parts.strip.dataset.url);
    if (response.ok && !response.redirected) {
      insert(parts.strip, await response.text());
    }
  }
})();
