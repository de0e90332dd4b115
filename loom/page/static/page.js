// What htmx does not: counts seconds between two refreshes, and says when the page is out of date.
(() => {
    "use strict";
    const STALE = 10000; // ms without a refresh
    let refreshed = performance.now(); // the numbers on the page are of then; the host's clock decides nothing here
    let paused = false;

    // As span() of loom/page/render.py.
    const span = seconds => {
        const whole = Math.round(Math.abs(seconds));
        const two = (n, unit, rest, less) => `${n} ${unit}` + (rest ? ` ${rest} ${less}` : "");
        if (whole < 60) return `${whole} s`;
        if (whole < 3600) return two(Math.floor(whole / 60), "min", whole < 600 ? whole % 60 : 0, "s");
        if (whole < 86400) return two(Math.floor(whole / 3600), "h", Math.floor(whole % 3600 / 60), "min");
        return two(Math.floor(whole / 86400), "d", Math.floor(whole % 86400 / 3600), "h");
    };

    const tick = () => {
        const passed = (performance.now() - refreshed) / 1000;
        for (const it of document.querySelectorAll("[data-left]")) {
            const left = it.dataset.left - passed;
            it.textContent = left < 0 ? `${span(left)} over` : span(left);
            it.classList.toggle("soon", left >= 0 && left < 10);
            it.classList.toggle("over", left < 0);
        }
        for (const it of document.querySelectorAll("[data-age]")) {
            const age = Number(it.dataset.age) + passed;
            it.textContent = `${span(age)} ago`;
            it.classList.toggle("late", age > 15);
        }
        const stale = document.getElementById("stale");
        const old = !paused && !document.hidden && document.querySelector("[hx-get]") && passed * 1000 > STALE;
        if (old !== !stale.hidden) stale.textContent = old ? "No instance answers: what you see is old." : "";
        stale.hidden = !old;
    };

    const pause = document.getElementById("pause");
    pause.hidden = !document.querySelector("[hx-get]");
    pause.addEventListener("click", () => {
        paused = !paused;
        pause.setAttribute("aria-pressed", paused);
        pause.textContent = paused ? "Go on" : "Pause updates";
    });

    document.addEventListener("htmx:before:request", event => {
        // Neither a page that nobody sees nor one from which text is being copied is refreshed.
        if (paused || document.hidden || !document.getSelection().isCollapsed) event.preventDefault();
    });
    document.addEventListener("htmx:before:response", event => {
        // An error of a proxy has no page, with which this one could be replaced.
        const kind = event.detail.ctx.response.headers.get("Content-Type") || "";
        if (!kind.startsWith("text/html")) event.preventDefault();
    });
    document.addEventListener("htmx:after:swap", () => {
        refreshed = performance.now();
        tick();
    });
    document.addEventListener("visibilitychange", tick);
    setInterval(tick, 1000);
})();
