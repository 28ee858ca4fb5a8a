// Shows the parameters of the chosen method only; without JavaScript all of them are there.
const form = document.getElementById("merge");

function show() {
  const chosen = form.querySelector('input[name="method"]:checked')?.value;
  for (const box of form.querySelectorAll(".parameters")) box.hidden = box.dataset.method !== chosen;
}

form?.addEventListener("change", show);
if (form) show();
