// The pictures of the explorable, on anything that draws like a canvas: the page's own, or the paper of still.mjs.
// A side is one of those of flow.mjs' Pair: a network, the ways of the points shown, and what was measured of them.

import {short, total} from './flow.mjs'

const CIRCLE = 2 * Math.PI

// The square that holds nearly all points of the sides at their starts and ends: its middle and half its width.
export function frame(sides) {
  const range = axis => {
    const ends = sides.flatMap(({x, points: {length}}) => [...x.subarray(0, length), ...x.subarray(x.length - length)])
    const all = Float64Array.from(ends.filter((_, i) => i % 2 === axis)).sort()
    const at = share => all.length ? all[Math.round(share * (all.length - 1))] : 0
    return [at(.01), at(.99)]
  }
  const [[left, right], [low, high]] = [range(0), range(1)]
  return {a: (left + right) / 2, b: (low + high) / 2, half: Math.max(1.25, .56 * Math.max(right - left, high - low))}
}

// From the plane to pixels of a square of that size, and back.
const pixels = ({a, b, half}, size) => (x, y) => [size / 2 * (1 + (x - a) / half), size / 2 * (1 - (y - b) / half)]
export const plane = ({a, b, half}, size) => (px, py) => [a + half * (2 * px / size - 1), b + half * (1 - 2 * py / size)]

// Where point i is at a layer, which may lie between two.
function position({x, labels}, i, layer) {
  const size = 2 * labels.length, k = Math.min(Math.floor(layer), x.length / size - 2)
  const part = layer - k, at = k * size + 2 * i
  return [x[at] + part * (x[at + size] - x[at]), x[at + 1] + part * (x[at + size + 1] - x[at + 1])]
}

function line(pen, points) {
  points.forEach(([px, py], i) => i ? pen.lineTo(px, py) : pen.moveTo(px, py))
}

// Class 0 as discs, class 1 as squares.
function mark(pen, px, py, label, radius) {
  if (label) pen.rect(px - .9 * radius, py - .9 * radius, 1.8 * radius, 1.8 * radius)
  else { pen.moveTo(px + radius, py); pen.arc(px, py, radius, 0, CIRCLE) }
}

function stroke(pen, color, alpha, width, path) {
  Object.assign(pen, {strokeStyle: color, globalAlpha: alpha, lineWidth: width})
  pen.beginPath(); path(); pen.stroke()
  pen.globalAlpha = 1
}

function fill(pen, color, alpha, path) {
  Object.assign(pen, {fillStyle: color, globalAlpha: alpha})
  pen.beginPath(); path(); pen.fill()
  pen.globalAlpha = 1
}

function write(pen, text, px, py, color, size, align = 'left') {
  Object.assign(pen, {fillStyle: color, font: `${size}px ${pen.family ?? 'sans-serif'}`, textAlign: align})
  pen.fillText(text, px, py)
}

const each = (labels, label, visit) => labels.forEach((l, i) => { if (l === label) visit(i) })


// The points on their way: what is done of it, and, paler, what is ahead.
export function drawFlow(pen, side, {size, box, layer, idea, colors}) {
  const {net, labels} = side, to = pixels(box, size), at = (i, k) => to(...position(side, i, k)), K = net.blocks
  const radius = size < 240 ? 2 : 2.8
  pen.clearRect(0, 0, size, size)
  if (!labels.length) return
  drawCut(pen, net, {size, box, to, colors, alpha: .15 + .75 * (layer / K) ** 3})
  for (const label of [0, 1]) {
    const color = label ? colors.second : colors.first
    const way = (i, from, to) => Array.from({length: to - from}, (_, k) => at(i, from + k))
    const done = i => line(pen, [...way(i, 0, Math.ceil(layer)), at(i, layer)])
    const ahead = i => line(pen, [at(i, layer), ...way(i, Math.floor(layer) + 1, K + 1)])
    stroke(pen, color, .65, 1.1, () => each(labels, label, done))
    if (layer < K) stroke(pen, color, .25, 1, () => each(labels, label, ahead))
  }
  if (idea === 'energy') drawStep(pen, side, at, layer, colors)
  if (idea === 'straight') drawMatching(pen, side, at, colors, radius)
  for (const label of [0, 1]) {
    const dots = () => each(labels, label, i => mark(pen, ...at(i, layer), label, radius))
    fill(pen, label ? colors.second : colors.first, 1, dots)
  }
}

// The straight line on which the last layer parts the classes.
function drawCut(pen, net, {size, box, to, colors, alpha}) {
  const c = net.margin(0, 0), a = net.margin(1, 0) - c, b = net.margin(0, 1) - c, norm = Math.hypot(a, b)
  if (!norm) return
  const foot = -(c + a * box.a + b * box.b) / norm ** 2, far = 4 * box.half / norm
  const [x, y] = [box.a + foot * a, box.b + foot * b]   // the point of the line that is nearest to the middle
  pen.setLineDash([5, 5])
  stroke(pen, colors.quiet, alpha, 1.2, () => line(pen, [to(x - far * b, y + far * a), to(x + far * b, y - far * a)]))
  pen.setLineDash([])
}

// What the block at work adds to each point.
function drawStep(pen, {labels, net}, at, layer, colors) {
  const k = Math.min(Math.floor(layer), net.blocks - 1)
  stroke(pen, colors.motion, .8, 2, () => labels.forEach((_, i) => line(pen, [at(i, k), at(i, k + 1)])))
}

// From each start to the end that the cheapest matching gives it.
function drawMatching(pen, {labels, net, split}, at, colors, radius) {
  stroke(pen, colors.motion, .85, 1.3, () => split.partner.forEach((j, i) => line(pen, [at(i, 0), at(j, net.blocks)])))
  stroke(pen, colors.motion, .85, 1, () => labels.forEach((label, i) => mark(pen, ...at(i, 0), label, radius - .6)))
}


// Below the picture, one strip for each idea; `top` is what the largest of both sides reaches.
export const drawStrip = {
  // The same points at four layers.
  flow(pen, side, {width, height, layer, box, colors}) {
    const K = side.net.blocks, size = Math.min(width / 4 - 6, height - 16), to = pixels(box, size)
    for (let i = 0; i < 4; i++) {
      const k = Math.round(i / 3 * K)
      const left = i * (width - size) / 3, now = Math.abs(layer - k) <= K / 8
      stroke(pen, now ? colors.quiet : colors.line, 1, 1, () => pen.rect(left + .5, .5, size - 1, size - 1))
      const dot = j => {
        const [px, py] = to(...position(side, j, k))
        if (Math.min(px, py, size - px, size - py) > 1) mark(pen, left + px, py, side.labels[j], size < 50 ? .9 : 1.3)
      }
      for (const label of [0, 1]) fill(pen, label ? colors.second : colors.first, .9, () => each(side.labels, label, dot))
      write(pen, i ? `${k}` : 'layer 0', left, size + 13, colors.quiet, 11)
    }
  },

  // Energy of each block.
  energy(pen, side, {width, height, layer, top, colors}) {
    const K = side.net.blocks, base = height - 16, step = width / K, now = Math.min(Math.floor(layer), K - 1)
    const high = e => (base - 14) * e / (top || 1)
    side.energy.forEach((e, k) => {
      fill(pen, colors.motion, k === now ? 1 : .5, () => pen.rect((k + .1) * step, base - high(e), .8 * step, high(e)))
    })
    stroke(pen, colors.line, 1, 1, () => line(pen, [[0, base + .5], [width, base + .5]]))
    write(pen, 'block 1', 0, height - 3, colors.quiet, 11)
    write(pen, `${K}`, width, height - 3, colors.quiet, 11, 'right')
    write(pen, `energy ${short(total(side.energy))}`, width, 10, colors.ink, 12, 'right')
  },

  // The parts of the energy: the cheapest way, wrong partners, ways that are not straight.
  straight(pen, side, {width, height, top, colors}) {
    const {total, transport, assignment, path} = side.split
    const parts = [['cheapest way', transport, 1], ['wrong partners', assignment, .55], ['crooked ways', path, .25]]
    let left = 0
    parts.forEach(([name, part, alpha], i) => {
      const long = width * part / (top || 1), y = 34 + i * (height - 36) / 3
      fill(pen, colors.motion, alpha, () => pen.rect(left, 0, long, 14))
      fill(pen, colors.motion, alpha, () => pen.rect(0, y - 9, 10, 10))
      write(pen, name, 16, y, colors.ink, 12)
      write(pen, `${Math.round(100 * part / (total || 1))} %`, Math.min(width, 160), y, colors.ink, 12, 'right')
      left += long
    })
  },

  // Loss, target and price over the steps, on logarithmic axes.
  price(pen, side, {width, height, steps, colors}) {
    const {loss, price} = side.curve, base = height - 16, right = width - 40
    const high = value => base * (1 - Math.min(Math.max(Math.log(value / .004) / Math.log(20 / .004), 0), 1))
    const curve = (values, name, color, width, low) => {
      if (!values.length) return
      const every = Math.ceil(values.length / 200), at = t => [right * t / Math.max(steps, 2), high(values[t])]
      const points = values.map((_, t) => t).filter(t => t % every === 0 || t === values.length - 1).map(at)
      stroke(pen, color, 1, width, () => line(pen, points))
      const [px, py] = points.at(-1)
      write(pen, name, Math.min(px + 5, right + 4), Math.min(Math.max(py + 4, 10), base) + low, color, 12)
    }
    stroke(pen, colors.line, 1, 1, () => line(pen, [[0, base + .5], [right, base + .5]]))
    pen.setLineDash([3, 4])
    stroke(pen, colors.quiet, 1, 1, () => line(pen, [[0, high(side.target)], [right, high(side.target)]]))
    pen.setLineDash([])
    write(pen, 'target', 0, high(side.target) + 13, colors.quiet, 11)
    const near = price.length && Math.abs(high(price.at(-1)) - high(loss.at(-1))) < 13   // the two names would meet
    curve(loss, 'loss', colors.ink, 1.5, near ? 10 : 0)
    curve(price, 'price', colors.motion, 2, near ? -4 : 0)
    write(pen, 'step 0', 0, height - 3, colors.quiet, 11)
    write(pen, `${steps}`, right, height - 3, colors.quiet, 11, 'right')
  },
}
