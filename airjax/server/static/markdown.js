// Markdown to DOM nodes. Text only ever becomes text nodes, so nothing that a model writes can become markup.

const INLINE = /(`+)(.+?)\1|\*\*(.+?)\*\*|__(.+?)__|\*([^\s*](?:[^*]*[^\s*])?)\*|\[([^\]]+)\]\(([^()\s]+)\)|(https?:\/\/[^\s<>()]+)/;

function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

function link(text, address) {
  if (!/^https?:\/\//i.test(address)) return text;
  const node = element("a", text);
  node.href = address;
  node.rel = "noopener noreferrer";
  node.target = "_blank";
  return node;
}

function inline(text) {
  const nodes = [];
  for (let found; text && (found = INLINE.exec(text)); text = text.slice(found.index + found[0].length)) {
    if (found.index) nodes.push(text.slice(0, found.index));
    const [, , code, strong, strong2, em, label, address, bare] = found;
    if (code !== undefined) nodes.push(element("code", code));
    else if (strong ?? strong2) nodes.push(element("strong", ...inline(strong ?? strong2)));
    else if (em) nodes.push(element("em", ...inline(em)));
    else if (label) nodes.push(link(label, address));
    else nodes.push(link(bare, bare));
  }
  if (text) nodes.push(text);
  return nodes;
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
const isRule = (line) => line !== undefined && /^\s*\|?[\s:|-]*-[\s:|-]*$/.test(line) && line.includes("|");
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;

function paragraph(lines) {
  const node = element("p");
  lines.forEach((line, at) => node.append(...(at ? [element("br")] : []), ...inline(line)));
  return node;
}

function list(lines, from) {
  const ordered = /\d/.test(ITEM.exec(lines[from])[2]);
  const indent = ITEM.exec(lines[from])[1].length;
  const node = element(ordered ? "ol" : "ul");
  if (ordered) node.start = parseInt(ITEM.exec(lines[from])[2], 10);
  let at = from;
  for (let found; at < lines.length && (found = ITEM.exec(lines[at])); ) {
    if (found[1].length < indent) break;
    if (found[1].length > indent + 1 && node.lastChild) {
      const [inner, next] = list(lines, at);
      node.lastChild.append(inner);
      at = next;
    } else {
      node.append(element("li", ...inline(found[3])));
      at += 1;
    }
  }
  return [node, at];
}

/** The nodes of a text; an unclosed code block, as in mid-stream, goes to the end. */
export function render(text) {
  const lines = text.split("\n");
  const nodes = [];
  for (let at = 0; at < lines.length; ) {
    const line = lines[at];
    const fence = /^\s*(```+|~~~+)/.exec(line);
    const heading = /^(#{1,6})\s+(.*)$/.exec(line);
    if (fence) {
      let end = at + 1;
      while (end < lines.length && !lines[end].trim().startsWith(fence[1])) end += 1;
      nodes.push(element("pre", element("code", lines.slice(at + 1, end).join("\n"))));
      at = end + 1;
    } else if (heading) {
      nodes.push(element("h" + Math.min(heading[1].length + 1, 4), ...inline(heading[2])));
      at += 1;
    } else if (/^\s*>/.test(line)) {
      let end = at;
      while (end < lines.length && /^\s*>/.test(lines[end])) end += 1;
      nodes.push(element("blockquote", paragraph(lines.slice(at, end).map((each) => each.replace(/^\s*>\s?/, "")))));
      at = end;
    } else if (ITEM.test(line)) {
      const [node, next] = list(lines, at);
      nodes.push(node);
      at = next;
    } else if (line.includes("|") && isRule(lines[at + 1])) {
      const table = element("table", element("tr", ...cells(line).map((cell) => element("th", ...inline(cell)))));
      for (at += 2; at < lines.length && lines[at].includes("|"); at += 1)
        table.append(element("tr", ...cells(lines[at]).map((cell) => element("td", ...inline(cell)))));
      nodes.push(table);
    } else if (!line.trim()) {
      at += 1;
    } else {
      let end = at + 1;
      while (end < lines.length && lines[end].trim() && !/^\s*(```|~~~|>|#{1,6}\s)/.test(lines[end]) && !ITEM.test(lines[end])) end += 1;
      nodes.push(paragraph(lines.slice(at, end)));
      at = end;
    }
  }
  return nodes;
}
