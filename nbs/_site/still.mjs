// Writes nbs/explorable.svg, what the explorable shows without script: `node nbs/_site/still.mjs [FILE]`. The same networks, the
// same drawing, on paper.
import {writeFileSync} from 'node:fs'
import {fileURLToPath} from 'node:url'
import {Pair} from './flow.mjs'
import {drawFlow, drawStrip, frame} from './drawing.mjs'

const COLORS = {ink: '#22252a', quiet: '#5f646c', line: '#e3e1da', first: '#1468ab', second: '#d8762b', motion: '#7b3fa0'}
const SIZE = 340, GAP = 20, STRIP = 92

// The part of a canvas' pen that drawing.mjs uses, as elements of an SVG.
class Pen {
  parts = []
  path = ''
  dash = ''
  family = 'sans-serif'
  clearRect() {}
  beginPath() { this.path = '' }
  moveTo(x, y) { this.path += `M${tenth(x)} ${tenth(y)}` }
  lineTo(x, y) { this.path += `L${tenth(x)} ${tenth(y)}` }
  rect(x, y, w, h) { this.path += `M${tenth(x)} ${tenth(y)}h${tenth(w)}v${tenth(h)}h${tenth(-w)}z` }
  arc(x, y, r) { this.path += `m${-2 * r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0` }
  setLineDash(lengths) { this.dash = lengths.join(' ') }
  stroke() {
    this.draw('path', {d: this.path, fill: 'none', stroke: this.strokeStyle, 'stroke-width': this.lineWidth,
                       opacity: tenth(10 * this.globalAlpha) / 10, 'stroke-dasharray': this.dash})
  }
  fill() { this.draw('path', {d: this.path, fill: this.fillStyle, opacity: tenth(10 * this.globalAlpha) / 10}) }
  fillText(text, x, y) {
    this.draw('text', {x: tenth(x), y: tenth(y), fill: this.fillStyle, 'font-size': parseFloat(this.font),
                       'text-anchor': this.textAlign === 'right' && 'end'}, text)
  }
  draw(...element) { this.parts.push(tag(...element)) }
  placed(x, y, width, height) { return tag('svg', {x, y, width, height, overflow: 'hidden'}, this.parts.join('')) }
}

function tag(name, attributes, content = '') {
  const given = Object.entries(attributes).filter(([, value]) => value || value === 0)
  const opening = `<${name}${given.map(([key, value]) => ` ${key}="${value}"`).join('')}`
  return content ? `${opening}>${content}</${name}>` : opening + '/>'
}
const tenth = number => Math.round(10 * number) / 10

const pair = new Pair()
while (pair.steps < 1000) pair.step()
const {sides, blocks} = pair.measure(), box = frame(sides), top = Math.max(...sides.flatMap(side => [...side.energy]))
const text = (words, x, y, weight) => tag('text', {x, y, 'font-size': 15, 'font-weight': weight, fill: COLORS.ink}, words)
const parts = sides.flatMap((side, i) => {
  const left = i * (SIZE + GAP), flow = new Pen(), strip = new Pen(), told = pair.told(side)
  drawFlow(flow, side, {size: SIZE, box, layer: blocks, idea: 'flow', colors: COLORS})
  drawStrip.energy(strip, side, {width: SIZE, height: STRIP, layer: blocks, top, colors: COLORS})
  return [
    text(['plain', 'least action'][i], left, 16, 600),
    tag('rect', {x: left, y: 26, width: SIZE, height: SIZE, rx: 8, fill: '#f6f5f1'}),
    flow.placed(left, 26, SIZE, SIZE),
    text(`accuracy ${told.accuracy} after ${side.training.steps} steps`, left, SIZE + 47),
    strip.placed(left, SIZE + 58, SIZE, STRIP),
  ]
})
const viewBox = `0 0 ${2 * SIZE + GAP} ${SIZE + 58 + STRIP}`
const svg = tag('svg', {xmlns: 'http://www.w3.org/2000/svg', viewBox, 'font-family': 'sans-serif'}, `\n${parts.join('\n')}\n`)
writeFileSync(process.argv[2] ?? fileURLToPath(new URL('../explorable.svg', import.meta.url)), svg + '\n')
