// The router page: copies the API call. Answers come by htmx; without JavaScript the form is sent as it is.
function offer(within) {
  for (const button of within.querySelectorAll("button.copy[hidden]")) button.hidden = false;
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button.copy");
  if (!button) return;
  const source = document.getElementById(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
    button.textContent = "Copied";
  } catch {
    // Without https there is no clipboard: the text is marked, ready for the keyboard.
    getSelection().selectAllChildren(source);
    button.textContent = "Marked: copy with the keyboard";
  }
});
document.addEventListener("htmx:afterSwap", (event) => offer(event.target));
offer(document);
