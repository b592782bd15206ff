// Enter starts, from any field that has no use of its own for it; the roll's playhead follows the player, and a click on the roll
// moves the player.
(() => {
  const player = () => document.querySelector("#result audio");
  const notes = () => document.querySelector("#roll .notes");
  const seconds = () => Number(document.querySelector("#roll .roll").dataset.seconds);

  document.addEventListener("keydown", (event) => {
    const field = event.target;
    if (event.key !== "Enter" || event.isComposing || !field.matches("input, textarea")) return;
    if (field.type === "file" || field.closest("#programs")) return;
    event.preventDefault();
    // The field's value is taken when it loses the focus; the click comes after that.
    field.blur();
    field.focus();
    setTimeout(() => document.getElementById("start").click(), 50);
  });

  const follow = () => {
    const audio = player(), head = document.querySelector("#roll .playhead");
    if (!audio || !head) return;
    head.hidden = audio.paused && audio.currentTime === 0;
    head.style.left = `${Math.min(100 * audio.currentTime / seconds(), 100)}%`;
    if (!audio.paused) requestAnimationFrame(follow);
  };
  for (const kind of ["play", "pause", "seeked", "ended"]) document.addEventListener(kind, follow, true);

  document.addEventListener("click", (event) => {
    const audio = player();
    if (!audio) return;
    const seek = event.target.closest("[data-seek]");
    if (seek) {
      audio.currentTime = Number(seek.dataset.seek);
      audio.play();
    } else if (event.target.closest("#roll .notes")) {
      const box = notes().getBoundingClientRect();
      audio.currentTime = seconds() * (event.clientX - box.left) / box.width;
    }
  });
})();
