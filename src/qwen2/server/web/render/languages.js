/** The languages that are coloured; others are shown plainly. tests/page/make_vendor.py takes their grammars. */

import bash from "../vendor/highlight/languages/bash.js";
import c from "../vendor/highlight/languages/c.js";
import cpp from "../vendor/highlight/languages/cpp.js";
import csharp from "../vendor/highlight/languages/csharp.js";
import css from "../vendor/highlight/languages/css.js";
import diff from "../vendor/highlight/languages/diff.js";
import dockerfile from "../vendor/highlight/languages/dockerfile.js";
import go from "../vendor/highlight/languages/go.js";
import haskell from "../vendor/highlight/languages/haskell.js";
import ini from "../vendor/highlight/languages/ini.js";
import java from "../vendor/highlight/languages/java.js";
import javascript from "../vendor/highlight/languages/javascript.js";
import json from "../vendor/highlight/languages/json.js";
import kotlin from "../vendor/highlight/languages/kotlin.js";
import latex from "../vendor/highlight/languages/latex.js";
import lua from "../vendor/highlight/languages/lua.js";
import makefile from "../vendor/highlight/languages/makefile.js";
import markdown from "../vendor/highlight/languages/markdown.js";
import php from "../vendor/highlight/languages/php.js";
import powershell from "../vendor/highlight/languages/powershell.js";
import python from "../vendor/highlight/languages/python.js";
import r from "../vendor/highlight/languages/r.js";
import ruby from "../vendor/highlight/languages/ruby.js";
import rust from "../vendor/highlight/languages/rust.js";
import sql from "../vendor/highlight/languages/sql.js";
import swift from "../vendor/highlight/languages/swift.js";
import typescript from "../vendor/highlight/languages/typescript.js";
import xml from "../vendor/highlight/languages/xml.js";
import yaml from "../vendor/highlight/languages/yaml.js";

export const LANGUAGES = {
  bash,
  c,
  cpp,
  csharp,
  css,
  diff,
  dockerfile,
  go,
  haskell,
  ini,
  java,
  javascript,
  json,
  kotlin,
  latex,
  lua,
  makefile,
  markdown,
  php,
  powershell,
  python,
  r,
  ruby,
  rust,
  sql,
  swift,
  typescript,
  xml,
  yaml,
};
