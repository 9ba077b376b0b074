// Two small networks that train in the page, from the same weights: plain beside least action. Each <div class="explorable">
// becomes one; what it held before, a still picture and words, is for those without script. data-idea and data-data,
// data-blocks, data-gain, data-seed say where it starts.
import {Pair, short, START} from './flow.mjs'
import {drawFlow, drawStrip, frame, plane} from './drawing.mjs'

const IDEAS = {
  flow: ['It flows', `Each dot is a sample. Block by block it moves, and in the end one straight cut, dashed, must part the
    classes.`],
  energy: ['How much it moves', `What a block adds to each sample, squared and averaged, is its energy: violet, on one scale
    for both. Turn the price of motion and watch.`],
  straight: ['How straight', `Violet lines lead from each start, hollow, to the end that the cheapest matching gives it. Where
    samples end elsewhere, or their ways are crooked or uneven, they move more than these ends cost.`],
  price: ['The price sets itself', `While the loss is above its target, λ rises and motion, at the price 1/λ, gets cheaper. Below it
    λ falls, and motion gets dearer.`],
}
const NAMES = {circles: 'Circles', moons: 'Moons', spirals: 'Two spirals', own: 'Your own points'}
const SPEEDS = [5, 15, 30, 60, 180]   // training steps per second
const LAST = 3000                     // steps after which training rests
const MOST = 200                      // points of one's own
const ROUND = 5200, REST = .16        // milliseconds of one way through the layers; the share of it spent at either end
const BUDGET = 8                      // milliseconds of a frame for training

const made = (name, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(name), properties)
  element.append(...children)
  return element
}
const button = (text, onclick, more) => made('button', {type: 'button', onclick, ...more}, text)
const calm = () => matchMedia('(prefers-reduced-motion: reduce)').matches

export class Explorable {
  constructor(box) {
    const {idea = 'flow', ...set} = box.dataset, {data, ...numbers} = {...START, ...set}
    for (const name in numbers) numbers[name] = Number(numbers[name])
    this.settings = {data, ...numbers}
    this.first = this.settings.lambda
    Object.assign(this, {box, idea, common: true, speed: 3, brush: 0, own: {points: [], labels: []}})
    Object.assign(this, {running: false, fresh: true, seen: false, held: false, layer: 0, clock: 0, due: 0})
    this.build()
    this.reset()
    this.pick(idea)
    new ResizeObserver(() => this.fit()).observe(this.faces[0].place)
    new MutationObserver(() => this.recolor()).observe(document.documentElement, {attributeFilter: ['data-scheme']})
    new IntersectionObserver(([entry]) => this.show(entry.isIntersecting), {threshold: .3}).observe(this.faces[0].place)
  }

  // What is trained and what is shown

  get empty() { return !this.pair.sides[0].labels.length }

  reset() {
    const {settings} = this, [points, labels] = [Float64Array.from(this.own.points), Uint8Array.from(this.own.labels)]
    if (settings.tau) settings.lambda = this.first
    this.pair = new Pair({...settings, own: settings.data === 'own' ? {points, labels} : null})
    Object.assign(this, {view: null, clock: 0, held: false, layer: calm() ? this.pair.blocks : 0})
    this.scrubber.max = this.pair.blocks
    this.measure()
    this.draw()
  }

  train() {
    this.pair.step()
    this.settings.lambda = this.pair.sides[1].training.lambda
  }

  measure() {
    const {sides} = this.pair.measure(this.idea === 'straight')
    const now = this.common ? [frame(sides)] : sides.map(side => frame([side]))
    this.view = sides.map((_, i) => ease(this.view?.[i], now[i % now.length]))
  }

  tell() {
    const {pair, settings: {lambda}, layer} = this
    for (const [i, {numbers, picture, name}] of this.faces.entries()) {
      const side = pair.sides[i], told = pair.told(side)
      for (const [key, value] of Object.entries(told)) numbers[key].textContent = this.empty ? '–' : value
      picture.setAttribute('aria-label', `${name}: ${side.labels.length} samples on their way through ${pair.blocks} blocks, `
        + `after ${side.training.steps} steps of training`)
    }
    this.box.dataset.steps = pair.steps
    if (!this.grabbed) this.price.value = -Math.log10(lambda)
    this.label(this.price, short(1 / lambda))
    this.scrubber.value = layer
    this.label(this.scrubber, `${layer.toFixed(1)} of ${pair.blocks}`)
  }

  label(control, text) {
    control.nextElementSibling.textContent = text
    control.setAttribute('aria-valuetext', text)
  }

  // Time

  start() {
    if (this.pair.steps >= LAST) this.reset()
    Object.assign(this, {running: true, held: false, fresh: false})
    this.press()
    this.run()
  }

  stop() {
    this.running = false
    this.press()
  }

  press() { this.toggle.textContent = this.running ? 'Stop' : 'Train' }

  // In view: go on, or begin by itself the first time. Out of view nothing is computed.
  show(seen) {
    this.seen = seen
    if (seen && this.fresh && !calm() && this.settings.data !== 'own') this.start()
    else this.run()
  }

  run() {
    if (this.ticking || !this.running || !this.seen) return
    let last = performance.now()
    const tick = now => {
      if (!(this.ticking = this.running && this.seen && requestAnimationFrame(tick))) return
      this.advance(Math.min(now - last, 100))
      last = now
    }
    this.ticking = requestAnimationFrame(tick)
  }

  // What passes in so many milliseconds: steps of training, within their share of the frame, and the way of the points.
  advance(passed) {
    const begun = performance.now(), before = Math.floor(this.clock / (calm() ? 500 : 120))
    this.clock += passed
    if (!this.empty) this.due = Math.min(this.due + SPEEDS[this.speed] * passed / 1000, 8)
    for (; this.due >= 1 && performance.now() - begun < BUDGET; this.due--) this.train()
    if (!this.held) this.layer = calm() ? this.pair.blocks : this.pair.blocks * along(this.clock % ROUND / ROUND)
    const often = Math.floor(this.clock / (calm() ? 500 : 120)) !== before
    if (often || !calm()) { this.measure(); this.draw(often) }
    if (this.pair.steps >= LAST) { this.stop(); this.layer = this.pair.blocks; this.draw() }
  }

  // Pictures

  draw(told = true) {
    const {layer, idea, colors, size, pair: {sides}} = this
    if (!size || !colors) return
    const top = Math.max(...sides.flatMap(side => idea === 'straight' ? side.split.total : [...side.energy]))
    this.faces.forEach(({pen, below}, i) => {
      const box = this.view[i]
      drawFlow(pen, sides[i], {size, box, layer, idea, colors})
      below.clearRect(0, 0, size, STRIP)
      const steps = sides[i].curve.loss.length
      drawStrip[idea](below, sides[i], {width: size, height: STRIP, layer, box, top, steps, colors})
      if (this.cross) drawCross(pen, this.cross, colors)
    })
    if (told) this.tell()
  }

  // Canvases as wide as their places, sharp on every screen.
  fit() {
    const size = Math.floor(this.faces[0].place.clientWidth), sharp = Math.min(devicePixelRatio || 1, 3)
    if (!size || size === this.size) return
    this.size = size
    const sized = (canvas, height) => {
      Object.assign(canvas, {width: size * sharp, height: height * sharp})
      Object.assign(canvas.style, {width: `${size}px`, height: `${height}px`})
      const pen = canvas.getContext('2d')
      pen.scale(sharp, sharp)
      return Object.assign(pen, {family: getComputedStyle(this.box).fontFamily})
    }
    for (const face of this.faces) Object.assign(face, {pen: sized(face.picture, size), below: sized(face.strip, STRIP)})
    this.recolor()
  }

  recolor() {
    const probe = this.box.appendChild(made('span'))
    const read = name => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color }
    const names = ['ink', 'quiet', 'line', 'first', 'second', 'motion']
    this.colors = Object.fromEntries(names.map(name => [name, read(name)]))
    probe.remove()
    this.draw()
  }

  // Controls

  build() {
    const {settings} = this
    this.faces = ['plain', 'least action'].map(name => this.face(name))
    this.caption = made('p', {className: 'caption'})
    this.toggle = button('Train', () => this.running ? this.stop() : this.start(), {className: 'go'})
    this.price = this.slider('Price of motion', -Math.log10(settings.lambda), [-2, 2, .01], value => this.turn(10 ** -value))
    this.price.onpointerdown = () => { this.grabbed = true }
    this.price.onpointerup = this.price.onpointercancel = () => { this.grabbed = false }
    this.scrubber = this.slider('Layer', 0, [0, settings.blocks, .1], value => {
      Object.assign(this, {held: true, layer: value})
      this.draw()
    })
    const speed = this.slider('Speed', this.speed, [0, SPEEDS.length - 1, 1], value => { this.speed = value },
                              value => `${SPEEDS[value]} steps/s`)
    const blocks = this.slider('Blocks', settings.blocks, [1, 20, 1], value => this.set('blocks', value))
    const gain = this.slider('Initial gain', settings.gain, [.1, 2, .1], value => this.set('gain', value))
    const seed = made('input', {type: 'number', min: 0, max: 9999, step: 1, value: settings.seed, onchange: () => {
      this.set('seed', seed.value = Math.min(Math.max(Math.round(+seed.value) || 0, 0), 9999))
    }})
    const names = Object.entries(NAMES)
    const data = made('select', {onchange: () => this.choose(data.value)},
                      ...names.map(([value, name]) => made('option', {value, selected: value === settings.data}, name)))
    const free = this.tick('sets itself', true, on => {
      settings.tau = on ? START.tau : 0
      this.pair.sides[1].training.tau = settings.tau
    })
    const common = this.tick('one scale', true, on => {
      Object.assign(this, {common: on, view: null})
      this.measure()
      this.draw()
    })
    this.hand = this.brushes()
    this.box.replaceChildren(
      this.tabs(), this.caption, made('div', {className: 'pair'}, ...this.faces.map(face => face.place)),
      row('first', this.toggle, button('Reset', () => this.reset()), this.price.parentElement, free),
      row('sliders', ...[this.scrubber, speed, blocks, gain].map(slider => slider.parentElement)),
      row('', made('label', {}, 'Data', data), made('label', {}, 'Seed', seed), common),
      this.hand)
  }

  // What needs networks of its own: new ones, and training goes on with them if it was under way.
  set(name, value) {
    this.settings[name] = value
    this.reset()
  }

  face(name) {
    const numbers = {energy: made('b'), straightness: made('b'), accuracy: made('b')}
    const picture = made('canvas', {className: 'picture', role: 'img'}), strip = made('canvas', {ariaHidden: 'true'})
    const measured = Object.entries(numbers).map(([word, number]) => made('span', {}, `${word} `, number))
    const place = made('div', {}, made('p', {className: 'name'}, name), picture,
                       made('p', {className: 'numbers'}, ...measured), strip)
    picture.onpointerdown = event => {
      const {left, top} = picture.getBoundingClientRect()
      this.put(event.clientX - left, event.clientY - top)
    }
    picture.onkeydown = event => this.steer(event)
    return {name, place, picture, strip, numbers}
  }

  slider(name, value, [min, max, step], change, words = value => value) {
    const input = made('input', {type: 'range', min, max, step, value, ariaLabel: name, oninput: () => {
      this.label(input, words(+input.value))
      change(+input.value)
    }})
    made('label', {}, made('span', {}, name), input, made('output'))
    this.label(input, words(value))
    return input
  }

  tick(name, checked, change) {
    const input = made('input', {type: 'checkbox', checked, onchange: () => change(input.checked)})
    return made('label', {className: 'check'}, input, name)
  }

  tabs() {
    this.ideas = Object.entries(IDEAS).map(([idea, [name]]) => button(name, () => this.pick(idea), {value: idea}))
    return made('div', {className: 'ideas', role: 'group', ariaLabel: 'What to look at'}, ...this.ideas)
  }

  pick(idea) {
    this.idea = this.box.dataset.idea = idea
    for (const tab of this.ideas) tab.setAttribute('aria-pressed', tab.value === idea)
    this.caption.textContent = IDEAS[idea][1]
    this.measure()
    this.draw()
  }

  // The price as one's own hand sets it: training goes on from there.
  turn(lambda) {
    this.settings.lambda = this.pair.sides[1].training.lambda = lambda
    this.label(this.price, short(1 / lambda))
    if (!this.running && this.pair.steps < LAST && !this.empty) this.start()
  }

  // Points of one's own

  choose(data) {
    this.hand.hidden = data !== 'own'
    for (const {picture} of this.faces) data === 'own' ? picture.tabIndex = 0 : picture.removeAttribute('tabindex')
    this.cross = null
    if (data === 'own') this.stop()
    this.set('data', data)
    if (data !== 'own' && !calm()) this.start()
  }

  brushes() {
    const brushes = ['● first class', '■ second class'].map((name, i) => button(name, () => this.dip(i)))
    const clear = button('Clear', () => {
      this.own = {points: [], labels: []}
      this.stop()
      this.reset()
    })
    this.dip = label => {
      this.brush = label
      brushes.forEach((each, i) => each.setAttribute('aria-pressed', i === label))
    }
    this.dip(0)
    const words = `Press in a picture to put a sample there; or Tab to it, move the cross with the arrow keys, Enter, C for the
      other class. Then Train.`
    return Object.assign(row('hand', ...brushes, clear, made('span', {}, words)), {hidden: true})
  }

  // A sample at a place of the picture, in pixels.
  put(px, py) {
    if (this.settings.data !== 'own' || this.own.labels.length >= MOST) return
    this.own.points.push(...plane(this.view[0], this.size)(px, py))
    this.own.labels.push(this.brush)
    this.reset()
  }

  steer(event) {
    if (this.settings.data !== 'own') return
    const cross = this.cross ??= [this.size / 2, this.size / 2]
    const move = {ArrowLeft: [-6, 0], ArrowRight: [6, 0], ArrowUp: [0, -6], ArrowDown: [0, 6]}[event.key]
    if (move) this.cross = cross.map((at, i) => Math.min(Math.max(at + move[i], 0), this.size))
    else if (event.key === 'Enter' || event.key === ' ') this.put(...cross)
    else if (event.key.toLowerCase() === 'c') this.dip(1 - this.brush)
    else return
    event.preventDefault()
    this.draw()
  }
}

const row = (name, ...parts) => made('div', {className: `row ${name}`}, ...parts)

function drawCross(pen, [x, y], {ink}) {
  Object.assign(pen, {strokeStyle: ink, lineWidth: 1})
  pen.beginPath()
  for (const [a, b] of [[7, 0], [0, 7]]) { pen.moveTo(x - a, y - b); pen.lineTo(x + a, y + b) }
  pen.stroke()
}

const STRIP = 92

// The layer, as a share, at a time of the round: at rest at both ends, and even in between.
const along = time => Math.min(Math.max((time - REST) / (1 - 2 * REST), 0), 1)

// Towards the new frame, not at once.
function ease(old, now) {
  if (!old) return now
  return Object.fromEntries(Object.keys(now).map(key => [key, old[key] + .12 * (now[key] - old[key])]))
}

if (typeof document !== 'undefined') addEventListener('DOMContentLoaded', () => {
  for (const box of document.querySelectorAll('.explorable')) box.explorable = new Explorable(box)
})
