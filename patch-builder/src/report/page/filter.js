const box = document.getElementById("filter");
if (box) {
  box.closest("p").hidden = false;
  box.addEventListener("input", () => {
    const wanted = box.value.toLowerCase();
    for (const e of document.querySelectorAll("[data-name]")) e.hidden = !e.dataset.name.toLowerCase().includes(wanted);
  });
}
for (const a of document.querySelectorAll('a[href^="#f"]')) {
  a.addEventListener("click", () => {
    const body = document.getElementById(a.getAttribute("href").slice(1));
    if (body && body.closest("details")) body.closest("details").open = true;
  });
}
