// Keep the end of the music in sight while it grows.
watch("value", () => {
  const scroll = element.querySelector(".scroll"), sheet = element.querySelector(".sheet");
  if (scroll && sheet.scrollWidth > scroll.clientWidth) {
    scroll.scrollLeft = Number(sheet.dataset.front) * sheet.scrollWidth - 0.7 * scroll.clientWidth;
  }
});
