// Searches the documents of each browser of the page, moves between them by keyboard, and tells the scores of tokens
// that are clicked, tapped or reached by keyboard. All else works without it.
"use strict";

const browsers = [...document.querySelectorAll(".browser")].map(makeBrowser);

function makeBrowser(section) {
  const articles = [...section.querySelectorAll(".document")];
  const toolbar = section.querySelector(".toolbar");
  const search = toolbar.querySelector("input[type=search]");
  const maskedOnly = toolbar.querySelector("input[type=checkbox]");
  const output = toolbar.querySelector("output");
  const texts = new Map(); // filled at the first search: most visitors never search

  function textsOf(article) {
    if (!texts.has(article)) {
      const name = article.querySelector("header").textContent;
      const tokens = [...article.querySelector(".tokens").children];
      // A break where unmasked tokens lie between: words of two masked spans are not one word.
      const masked = tokens.map((token) => (token.classList.contains("m") ? token.textContent : "\n")).join("");
      const whole = tokens.map((token) => token.textContent).join("");
      texts.set(article, [`${name}\n${whole}`, masked.trim()].map((text) => text.toLowerCase()));
    }
    return texts.get(article);
  }

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const article of articles) {
      let shown = true;
      if (words.length || maskedOnly.checked) {
        const [whole, masked] = textsOf(article);
        const text = maskedOnly.checked ? masked : whole;
        shown = Boolean(text) && words.every((word) => text.includes(word));
      }
      article.hidden = !shown;
      count += shown;
    }
    output.textContent = `${count} of ${articles.length} documents`;
  }

  function move(step) {
    const shown = articles.filter((article) => !article.hidden);
    const current = shown.indexOf(document.activeElement.closest(".document"));
    const next = shown[current < 0 ? (step > 0 ? 0 : shown.length - 1) : current + step];
    if (next) {
      next.focus({ preventScroll: true });
      next.scrollIntoView({ block: "start" });
    }
  }

  search.addEventListener("input", filter);
  maskedOnly.addEventListener("change", filter);
  toolbar.hidden = false;
  filter();
  return { section, search, move };
}

/** The browser that holds the focus, else the first one in view, else the first. */
function currentBrowser() {
  const inView = ({ section }) => {
    const { top, bottom } = section.getBoundingClientRect();
    return bottom > 0 && top < innerHeight;
  };
  return (
    browsers.find(({ section }) => section.contains(document.activeElement)) || browsers.find(inView) || browsers[0]
  );
}

/** Writes a token and its score below its document. */
function tell(token) {
  const article = token.closest(".document");
  article.querySelector(".now")?.classList.remove("now");
  token.classList.add("now");
  const text = token.textContent.replaceAll("\n", "↵").replaceAll("\t", "⇥");
  const kinds = [token.matches(".m") && "masked", token.matches(".k") && "annotated"].filter(Boolean);
  const name = text ? `“${text}”` : "(no text of its own)";
  const scored = token.title ? `${name} score ${token.title}` : name;
  article.querySelector("output").textContent = [scored, ...kinds].join(", ");
}

/** Tells the next or previous token of a document, at first its first one. */
function tellNext(article, forward) {
  const tokens = article.querySelector(".tokens");
  if (getComputedStyle(tokens).filter !== "none") {
    article.querySelector("output").textContent = "Show the text first.";
    return;
  }
  const now = tokens.querySelector(".now");
  const token = now ? (forward ? now.nextElementSibling : now.previousElementSibling) : tokens.firstElementChild;
  if (token) {
    tell(token);
    token.scrollIntoView({ block: "nearest" });
  }
}

document.addEventListener("click", (event) => {
  const token = event.target.closest(".tokens > span");
  if (token) tell(token);
});

document.addEventListener("keydown", (event) => {
  const browser = currentBrowser();
  if (!browser || event.ctrlKey || event.metaKey || event.altKey) return;
  const target = event.target;
  const typing = target.matches("input[type=search]");
  const onDocument = target.matches(".document");
  const article = target.closest(".document");
  const act = (action) => {
    event.preventDefault();
    action();
  };
  if (typing) {
    if (event.key === "ArrowDown" || event.key === "Enter") act(() => browser.move(1));
    else if (event.key === "Escape" && !target.value) act(() => target.blur());
  } else if (event.key === "/") act(() => browser.search.focus());
  else if (event.key === "j" || (onDocument && event.key === "ArrowDown")) act(() => browser.move(1));
  else if (event.key === "k" || (onDocument && event.key === "ArrowUp")) act(() => browser.move(-1));
  else if (article && !event.shiftKey && (event.key === "ArrowRight" || event.key === "ArrowLeft"))
    act(() => tellNext(article, event.key === "ArrowRight"));
  else if (onDocument && event.key === "Enter") act(() => target.querySelector(".reveal").click());
});
