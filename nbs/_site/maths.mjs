// Formulas as pictures: reads a list of pages from standard input, each a list of {tex, display}, and writes for each page the formulas
// as SVG with their MathML, the glyphs that they share, and for all the style sheet. render.py calls it.
import {readFileSync} from 'node:fs'
import mathjax from 'mathjax'

const MathJax = await mathjax.init({
  loader: {load: ['input/tex-full', 'output/svg', 'a11y/assistive-mml']},
  tex: {packages: {'[-]': ['noerrors', 'noundefined']}},   // what is wrong is named, not shown as it is written
  svg: {fontCache: 'global'},
  options: {enableAssistiveMml: true},
})
const {adaptor, output} = MathJax.startup

// Without the notes that MathJax makes for itself.
const html = node => adaptor.outerHTML(node).replace(/ data-(mml-node|c|mjx-texclass)="[^"]*"/g, '').replaceAll('xlink:href', 'href')

const pages = JSON.parse(readFileSync(0, 'utf8')).map(formulas => {
  output.clearFontCache()
  const typeset = formulas.map(({tex, display}) => html(MathJax.tex2svg(tex, {display})))
  const glyphs = `<svg xmlns="http://www.w3.org/2000/svg" class="glyphs" aria-hidden="true">${html(output.fontCache.getCache())}</svg>`
  return {typeset, glyphs}
})
process.stdout.write(JSON.stringify({pages, style: adaptor.textContent(MathJax.svgStylesheet())}))
