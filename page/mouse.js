// Mouse, finger and keys on the page; app.py is told of them as "press", "drag", "turn" and "key".
const view = (event) => event.target.closest?.(".view"), rubber = () => document.querySelector(".rubber").style;
const share = (event) => {  // where on the image, as shares of its width and height
  const place = document.querySelector(".view img").getBoundingClientRect();
  return [(event.clientX - place.left) / place.width, (event.clientY - place.top) / place.height];
};
let pressed = null, turned = 0;
const press = (point) => { emitEvent("press", !!point); pressed = point; };
document.addEventListener("pointerdown", (event) => {
  if (!view(event) || event.button || !event.isPrimary) return;
  document.activeElement.blur();
  view(event).setPointerCapture(event.pointerId);
  rubber().display = "none";
  press(share(event));
});
document.addEventListener("pointermove", (event) => {
  if (!pressed) return;
  const [[x0, x1], [y0, y1]] = share(event).map((end, i) => [end, pressed[i]].sort((a, b) => a - b).map((s) => 100 * s));
  Object.assign(rubber(), { display: "block", left: `${x0}%`, top: `${y0}%`, width: `${x1 - x0}%`, height: `${y1 - y0}%` });
});
for (const name of ["pointerup", "pointercancel"]) document.addEventListener(name, (event) => {
  if (!pressed) return;
  if (name === "pointerup") emitEvent("drag", { ends: [...pressed, ...share(event)], shift: event.shiftKey });
  press(null);
});
// the picture that has the box's mask
document.addEventListener("load", (event) => { if (view(event) && !pressed) rubber().display = "none"; }, true);
document.addEventListener("wheel", (event) => {
  if (!view(event) || document.querySelector(".q-slider.hidden")) return;
  event.preventDefault();
  if (Date.now() - turned > 40) emitEvent("turn", -Math.sign(event.deltaY)), (turned = Date.now());
}, { passive: false });
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, [role=slider], [role=radio]") || event.ctrlKey || event.altKey || event.metaKey) return;
  const steps = { ArrowUp: 1, ArrowDown: -1, PageUp: 10, PageDown: -10 }[event.key];
  if (steps || /^(Delete|[ucxs])$/.test(event.key)) event.preventDefault(), emitEvent(steps ? "turn" : "key", steps || event.key);
});
