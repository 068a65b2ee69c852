// Trades the token behind # for a cookie, and opens the page that was asked for.
"use strict";
(async () => {
  const here = location.pathname + location.search;
  const token = /^#t=([\w-]+)$/.exec(location.hash);
  const enter = () => {
    // The page is requested again, now by this origin. Not in a loop, whatever the browser does with cookies.
    const last = Number(sessionStorage.getItem("polymesh-entered"));
    if (Date.now() - last < 3000) return false;
    sessionStorage.setItem("polymesh-entered", String(Date.now()));
    location.replace(here);
    return true;
  };
  let reason = "";
  try {
    if (token) {
      history.replaceState(null, "", here);
      const answer = await fetch("/.polymesh/session", { method: "POST", body: token[1] });
      if (answer.ok && enter()) return;
      if (!answer.ok) reason = await answer.text();
    }
    const answer = await fetch("/.polymesh/session");
    if (answer.ok && enter()) return;
  } catch (error) {
    reason = String(error);
  }
  document.getElementById("opening").hidden = true;
  document.getElementById("closed").hidden = false;
  document.getElementById("reason").textContent = reason;
})();
