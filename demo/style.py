"""How the page looks: its style sheet, its colours, and the script by which a click on a time shows it in the video.

Text has a contrast of at least 4.5:1 with what is behind it, by day and by night; tests/test_demo_browser.py measures.
"""

# Dark enough for white text on it, and for its own text on white.
GREEN, RED = "#0f7a3c", "#c0392b"
# Day and night.
COLORS = {
    "body_text_color_subdued": "#4b5563",
    "body_text_color_subdued_dark": "#c3c8d1",
    "block_label_text_color": "#4b5563",
    "block_label_text_color_dark": "#c3c8d1",
    "input_placeholder_color": "#5b6472",
    "input_placeholder_color_dark": "#aab1bd",
    "button_primary_background_fill": GREEN,
    "button_primary_background_fill_dark": GREEN,
    "button_primary_background_fill_hover": "#0b5f2e",
    "button_primary_background_fill_hover_dark": "#0b5f2e",
    "button_primary_text_color": "white",
    "button_primary_text_color_dark": "white",
    "button_secondary_background_fill": "white",
    "button_secondary_background_fill_dark": "#2b323d",
    "button_secondary_background_fill_hover": "#eef1f4",
    "button_secondary_background_fill_hover_dark": "#3a4350",
    "button_secondary_text_color_hover": "#1f2937",
    "button_secondary_text_color_hover_dark": "#f1f3f6",
    "button_secondary_border_color": "#9aa3af",
    "button_secondary_border_color_dark": "#6b7482",
    "button_secondary_text_color": "#1f2937",
    "button_secondary_text_color_dark": "#f1f3f6",
    "button_border_width": "1px",
    "button_border_width_dark": "1px",
    "button_primary_border_color": "transparent",
    "button_primary_border_color_dark": "transparent",
    "button_secondary_shadow": "none",
    "checkbox_border_color": "#6b7280",
    "checkbox_border_color_dark": "#aab1bd",
    "checkbox_border_width": "1px",
    "block_border_width": "1px",
    "block_shadow": "none",
}

CSS = """
.gradio-container { max-width: min(1120px, 100vw) !important; margin: 0 auto !important; }
.gradio-container { --seen: #0f7a3c; --seen-soft: #cfe8d8; --rest: #9aa3af; --rest-soft: #eceef1; --named: #c0392b; }
.dark .gradio-container, .gradio-container.dark, .dark { --seen: #35b06a; --seen-soft: #1d4530; --rest: #7d8795;
  --rest-soft: #2b323d; --named: #ff7a6b; }
#head, #facts, #problem, #seen, :is(#head, #facts, #problem, #seen) .html-container { padding: 0; }
#head h1 { margin: 0 0 4px; font-size: 28px; } #head p { margin: 0 0 4px; max-width: 78ch; }
#head p.toy { background: #fff4d6; color: #4a3500; border-radius: 8px; padding: 8px 12px; max-width: none; }
.dark #head p.toy { background: #46380f; color: #ffe9b3; }
#examples { gap: 8px; flex-wrap: wrap; align-items: center; }
#examples > * { flex: 0 1 auto; width: auto; min-width: 0 !important; }
#examples .html-container { padding: 0; } #examples button { padding: 6px 10px; font-size: 13.5px; }
#question .submit-button, #question .stop-button { background: #0f7a3c; color: white; border-radius: 6px;
  padding: 4px 14px; }
#question .stop-button { background: #b3261e; }
/* Cutting a video is not for this page: it would load a program from elsewhere. */
#clip :is(button[aria-label*="rim"], button[aria-label*="eset"], button[aria-label*="ndo"]) { display: none; }
#clip .controls, #clip .controls * { color: white !important; }
.toast-close { color: var(--body-text-color) !important; opacity: 1 !important; }
#talk .message-content { white-space: pre-wrap; }
#talk .placeholder-content, #talk .placeholder { opacity: 1; color: var(--body-text-color-subdued); }
#remember { border-width: 0 !important; padding: 0 4px; box-shadow: none; background: none; }
#files { gap: 8px; flex-wrap: wrap; } #files > * { flex: 1 1 auto; min-width: 0 !important; }
.note { overflow-wrap: anywhere; color: var(--body-text-color); }
.note + .note { margin-top: 6px; }
.note.warning { border-left: 4px solid #b7791f; padding: 6px 12px; background: rgba(214, 158, 39, .14);
  border-radius: 4px; }
.note.error { border-left: 4px solid #c0392b; padding: 6px 12px; background: rgba(214, 39, 40, .09);
  border-radius: 4px; }
#facts { min-height: 24px; }
/* The bar of a video that is read has a place of its own: gradio lays it over what stands there, in three texts. */
#facts { display: flex; flex-direction: column; }
#facts > .wrap:not(.hide) { position: static !important; order: 2; height: auto; background: none; display: block; }
#facts > .wrap :is(.eta-bar, .meta-text, .meta-text-center, .progress-level-inner, .loader) { display: none; }
#facts > .wrap .progress-level { flex: none; width: 100%; }
#facts > .wrap .progress-bar-wrap { width: 100%; margin: 6px 0 0; }
#facts > .wrap .progress-bar { background: #0f7a3c; }
#facts:has(> .wrap:not(.hide)) .html-container { opacity: 1; }
#columns > *, #seen, #seen > * { min-width: 0; max-width: 100%; }
.timeline { overflow: hidden; border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 12px 14px;
  background: var(--block-background-fill); color: var(--body-text-color); }
.timeline header { display: flex; flex-direction: column; gap: 4px; }
.timeline .legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; }
.timeline .legend b { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px; }
.timeline .legend .dense { background: var(--seen); } .timeline .legend .pooled { background: var(--rest); }
.timeline .legend .dropped { border: 1px dashed var(--rest); }
.timeline .legend .named { width: 0; height: 0; border: 6px solid transparent; border-top: 9px solid var(--named);
  border-bottom: 0; }
.timeline .cites { position: relative; height: 13px; margin-top: 4px; }
.timeline .cite { position: absolute; bottom: 2px; height: 9px; min-width: 3px; margin-left: -1px; cursor: pointer;
  border-bottom: 3px solid var(--named); }
.timeline .cite::before { content: ""; position: absolute; left: -5px; bottom: -3px; border: 6px solid transparent;
  border-top: 9px solid var(--named); border-bottom: 0; }
.timeline .bars { position: relative; height: 56px; border-bottom: 1px solid var(--body-text-color-subdued); }
.timeline .chunk { position: absolute; bottom: 0; height: 100%; cursor: pointer; }
.timeline .chunk i { position: absolute; bottom: 0; left: 0; right: 0; min-height: 3px; }
.timeline .chunk, .timeline .chunk i { border-right: 1px solid var(--block-background-fill); }
.timeline .chunk:hover { filter: brightness(.85); }
.timeline .bars .dense { background: var(--seen-soft); } .timeline .bars .dense i { background: var(--seen); }
.timeline .bars .pooled { background: var(--rest-soft); } .timeline .bars .pooled i { background: var(--rest); }
.timeline .ticks { position: relative; height: 20px; font-size: 12px; color: var(--body-text-color-subdued); }
.timeline .ticks span { position: absolute; top: 3px; width: auto !important; transform: translateX(-50%);
  white-space: nowrap; }
.timeline .ticks span:first-child { transform: none; }
.timeline .scroll { overflow-x: auto; padding-bottom: 4px; contain: inline-size; }
.timeline summary { cursor: pointer; font-size: 13px; color: var(--body-text-color); }
.timeline .chips { display: flex; flex-wrap: wrap; gap: 2px; align-items: center; margin-top: 8px; font-size: 13px; }
.timeline .chips summary { text-decoration: underline; margin-bottom: 4px; }
#seen .timeline button { font: inherit; color: inherit; box-shadow: none; padding: 2px 8px;
  margin: 0 4px 4px 0 !important; border-radius: 6px; border: 1px solid var(--seen); cursor: pointer;
  font-variant-numeric: tabular-nums; background: var(--block-background-fill); }
#seen .timeline button.named { border-color: var(--named); }
@media (max-width: 640px) {
  .gradio-container { padding: 4px !important; }
  #head h1 { font-size: 22px; } #head p { font-size: 14px; line-height: 1.4; }
  #examples button { width: 100%; }
  #examples > * { flex: 1 1 100%; }
  /* One column, in which video, answer, question and timeline fit a screen. */
  #columns { flex-direction: column; gap: 8px; } #columns > .column { display: contents; }
  #columns #clip { order: 1; height: 200px !important; } #columns #facts { order: 2; }
  #columns #talk { order: 3; height: 190px !important; min-height: 190px !important; }
  #columns .form:has(#question) { order: 4; } #columns #problem { order: 5; }
  #columns #seen { order: 6; } #columns #remember { order: 7; } #columns #files { order: 8; }
}
"""

SEEK = """
element.addEventListener("click", (event) => {
  const place = event.target.closest("[data-seconds]");
  const clip = document.querySelector("#clip video");
  if (place && clip) { clip.pause(); clip.currentTime = Number(place.dataset.seconds); }
});
"""

# The clip begins with an empty scene: show a moment in which there is something. On a phone the page scrolls there.
SHOW_EXAMPLE = """
() => {
  if (window.innerWidth <= 640) document.querySelector("#columns").scrollIntoView({behavior: "smooth"});
  let tries = 50;
  const show = () => {
    const clip = document.querySelector("#clip video");
    if (clip && clip.readyState > 0) clip.currentTime = 12;
    else if (tries--) setTimeout(show, 100);
  };
  show();
}
"""
