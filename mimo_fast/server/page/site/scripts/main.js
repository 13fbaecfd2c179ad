/** The page: tabs, panels and what they share. */

import { configureAsk, setUpAsk } from "./ask.js";
import { loadConfig, news } from "./config.js";
import { configureConvert, setUpConvert } from "./convert.js";
import { get, show } from "./dom.js";
import { setUpKeys } from "./keys.js";
import { refusalProblem } from "./problems.js";
import { configureSay, setUpSay } from "./say.js";
import { configureSettings, setUpSettings } from "./settings_panel.js";
import { setUpShortcuts } from "./shortcuts.js";
import { setUpTabs } from "./tabs.js";
import { configureTalk, setUpTalk } from "./talk.js";
import { configureTranscribe, setUpTranscribe } from "./transcribe.js";

setUpKeys();
setUpTalk();
setUpSay();
setUpTranscribe();
setUpAsk();
setUpConvert();
setUpSettings();
setUpTabs();
setUpShortcuts();

news.on("config", (config) => {
  get("model-name").textContent = config.model;
  show(get("server-notice"), "");
  configureTalk(config);
  configureSay(config);
  configureTranscribe(config);
  configureAsk(config);
  configureConvert(config);
  configureSettings(config);
  document.documentElement.dataset.ready = "true";
});

loadConfig().catch((error) => {
  show(get("server-notice"), refusalProblem(error).text);
});
