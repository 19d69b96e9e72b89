/** The scrolled view stays at the end while the end grows, unless the reader has scrolled up. */

const NEAR = 48; // pixels from the end that count as the end

export class Follow {
  constructor(scroller, content, button) {
    this.scroller = scroller;
    this.button = button;
    this.following = true;
    this.last = 0;
    scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    button.addEventListener("click", () => this.toEnd(true));
    this.observer = new ResizeObserver(() => this.#grown());
    this.observer.observe(content);
    this.observer.observe(scroller);
  }

  /** Go to the end and stay there. */
  toEnd(smooth = false) {
    this.following = true;
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.scroller.scrollTo({ top: this.scroller.scrollHeight, behavior: smooth && !calm ? "smooth" : "instant" });
    this.#show();
  }

  #grown() {
    if (this.following) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.#show();
  }

  #scrolled() {
    const { scrollTop } = this.scroller;
    if (this.#distance() < NEAR) this.following = true;
    else if (scrollTop < this.last - 1) this.following = false;
    this.last = scrollTop;
    this.#show();
  }

  #distance() {
    return this.scroller.scrollHeight - this.scroller.clientHeight - this.scroller.scrollTop;
  }

  #show() {
    this.button.hidden = this.following || this.#distance() < NEAR;
  }
}
