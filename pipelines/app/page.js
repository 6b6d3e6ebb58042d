// What the page does in the browser, without the server.
window.dg = {
  // Puts a picture of a batch on the stage.
  put(button) {
    const stage = button.closest(".dg-stage"), [first, over] = stage.querySelectorAll(".dg-pair img");
    if (over) first.src = button.dataset.plain;
    (over || first).src = button.firstElementChild.src;
    Object.assign(stage.querySelector(".dg-file"), { href: button.firstElementChild.src, download: button.dataset.name });
    stage.querySelectorAll(".dg-thumbs button").forEach((each) => each.setAttribute("aria-pressed", each === button));
  },
  // Returns the settings in a PNG that was made here. The file stays in the browser.
  async settings(file) {
    const bytes = new DataView(await file.arrayBuffer()), text = new TextDecoder("latin1");
    const name = (at, length) => text.decode(new Uint8Array(bytes.buffer, at, length));
    if (bytes.byteLength < 8 || bytes.getUint32(0) !== 0x89504e47) return null;
    for (let at = 8; at + 12 <= bytes.byteLength; ) {
      const length = bytes.getUint32(at), kind = name(at + 4, 4);
      if (at + 12 + length > bytes.byteLength) return null;
      if (kind === "tEXt") {
        const [key, value] = name(at + 8, length).split("\0");
        if (key === "diffusers-guidance") return JSON.parse(value).settings ?? null;
      }
      at += 12 + length;
    }
    return null;
  },
  async restore(input) {
    const said = input.parentNode.querySelector("output");
    let found = null;
    try { found = await dg.settings(input.files[0]); } catch (error) { found = null; }
    if (!found) { said.textContent = "This file is not a picture that was made here: it does not carry settings."; return; }
    const plain = (value) => value === true ? "True" : value === false ? "False" : value === null ? "" : String(value);
    location.search = new URLSearchParams(Object.entries(found).map(([key, value]) => [key, plain(value)]));
  },
  enlarge(button) {
    const box = document.createElement("dialog");
    box.className = "dg-large";
    box.append(Object.assign(button.querySelector("img").cloneNode(), { style: "" }));
    box.onclick = () => box.close();
    box.onclose = () => { box.remove(); button.focus(); };
    document.body.append(box);
    box.showModal();
  },
};
// Arrow keys move within a group of radio buttons, as they do on other pages.
document.addEventListener("keydown", (event) => {
  const by = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
  const radio = event.target;
  if (!by || radio.type !== "radio" || event.altKey || event.ctrlKey || event.metaKey) return;
  const all = [...radio.closest("fieldset, [role=radiogroup], .block").querySelectorAll("input[type=radio]")];
  const next = all[(all.indexOf(radio) + by + all.length) % all.length];
  event.preventDefault();
  next.focus();
  next.click();
});
// Gradio opens the list of a dropdown at any key, also at the Tab that leaves it: the list would stay open.
document.addEventListener("keydown", (event) => {
  if (event.key === "Tab" && event.target.role === "combobox") event.stopPropagation();
}, true);
