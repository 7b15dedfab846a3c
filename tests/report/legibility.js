/* Texts that are too small, or whose contrast with what is behind them is below WCAG's AA. */
(() => {
  const parse = (color) => color.match(/[\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const part = (value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    };
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const isText = [...node.childNodes].some((each) => each.nodeType === 3 && each.data.trim());
    if (!isText || !node.checkVisibility() || /^(SCRIPT|NOSCRIPT|OPTION)$/.test(node.tagName)) continue;
    const style = getComputedStyle(node);
    const pair = [light(parse(style.color)), light(behind(node))].sort((a, b) => b - a);
    const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
    const size = parseFloat(style.fontSize);
    const box = node.getBoundingClientRect();
    const isCut = box.right > innerWidth + 1 && !node.closest(".wide");
    if (contrast < 4.5 || size < 12 || isCut) {
      found.push([node.tagName, node.className, contrast, size, box.right]);
    }
  }
  return JSON.stringify(found.slice(0, 9));
})();
