// Colour scheme, search, where in the page one is, and what helps in reading. Loaded in <head>, before the first paint.
const root = document.documentElement
const $ = selector => document.querySelector(selector)

// Storage may be forbidden (pages opened from a folder, private windows): then the choice lasts for the page.
const remember = scheme => { try { localStorage.setItem('scheme', scheme) } catch {} }
const remembered = () => { try { return localStorage.getItem('scheme') } catch { return null } }

function setScheme(scheme) {
  root.dataset.scheme = scheme
  $('#theme')?.setAttribute('aria-pressed', scheme === 'dark')
}

setScheme(remembered() ?? (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light'))

addEventListener('DOMContentLoaded', () => {
  setScheme(root.dataset.scheme)
  $('#theme').onclick = () => {
    setScheme(root.dataset.scheme === 'dark' ? 'light' : 'dark')
    remember(root.dataset.scheme)
  }
  $('#book [aria-current]')?.scrollIntoView({block: 'nearest'})
  markSectionInView()
  enableSearch($('#search'), $('#search-results'))
  markWidePictures()
  openToKeyboard()
  nameSliders()
  linkHeadings()
  offerCopies()
  openTarget()
  addEventListener('hashchange', openTarget)
})

// An entry of the library that is led to opens.
function openTarget() {
  const entry = document.getElementById(decodeURIComponent(location.hash.slice(1)))?.closest('details.api')
  if (entry) entry.open = true
}

// A heading's own address, at its end. It has no text, so that the heading keeps its own. An entry's heading opens it instead.
function linkHeadings() {
  for (const heading of document.querySelectorAll('main :is(h2, h3)[id]:not(summary *)')) {
    heading.append(element('a', {className: 'permalink', href: `#${heading.id}`, ariaLabel: `Link to: ${heading.innerText}`}))
  }
}

// Code is copied as it would be typed; where the browser forbids it, it is marked for copying by hand.
function offerCopies() {
  for (const code of document.querySelectorAll('main div.sourceCode:not(.signature) code')) {
    const button = element('button', {type: 'button', className: 'copy', ariaLabel: 'Copy the code'})
    button.onclick = async () => {
      const done = await navigator.clipboard?.writeText(code.innerText.trimEnd() + '\n').then(() => true, () => false)
      if (done) button.dataset.done = true
      else getSelection().selectAllChildren(code)
      setTimeout(() => delete button.dataset.done, 1500)
    }
    code.closest('div.sourceCode').append(button)
  }
}

// Pictures too wide for a phone: style.css lets them be scrolled there.
function markWidePictures() {
  const mark = () => document.querySelectorAll('main :is(figure, p) > img').forEach(img => img.classList.toggle('wide', img.naturalWidth > 700))
  addEventListener('load', mark, true)
  mark()
}

// What is wider than its box can be scrolled with the arrow keys, once it can be reached with the tab key.
function openToKeyboard() {
  const mark = () => document.querySelectorAll('main pre, main table, main .math, main :is(figure, p):has(> img)').forEach(box => {
    for (let e = box; e && e.tagName !== 'MAIN'; e = e.parentElement) {
      const scrolls = e.scrollWidth > e.clientWidth && ['auto', 'scroll'].includes(getComputedStyle(e).overflowX)
      if (scrolls) e.tabIndex = 0
      else if (e === box || e.hasAttribute('tabindex')) e.removeAttribute('tabindex')
    }
  })
  for (const change of ['load', 'resize', 'toggle']) addEventListener(change, mark, true)
  mark()
}

// The widgets' script gives a slider's handle no name, and a position or a logarithm for its value: label and value stand beside it.
function nameSliders() {
  const name = () => document.querySelectorAll('[role=slider]').forEach(handle => {
    const box = handle.closest('.widget-slider') ?? handle.closest('.jupyter-widgets')
    const label = box?.querySelector('.widget-label')?.textContent || 'Value', value = box?.querySelector('.widget-readout')?.textContent
    if (handle.getAttribute('aria-label') !== label) handle.setAttribute('aria-label', label)
    if (value && handle.getAttribute('aria-valuetext') !== value) handle.setAttribute('aria-valuetext', value)
  })
  new MutationObserver(name).observe(document.body,
    {childList: true, subtree: true, characterData: true, attributes: true, attributeFilter: ['aria-valuetext']})
  name()
}

function markSectionInView() {
  const links = new Map([...document.querySelectorAll('.contents nav a')].map(a => [decodeURIComponent(a.hash.slice(1)), a]))
  const headings = [...links.keys()].map(id => document.getElementById(id))
  const mark = () => {
    const passed = headings.filter(h => h.getBoundingClientRect().top < 120).at(-1)
    links.forEach((a, id) => a.classList.toggle('here', id === passed?.id))
  }
  addEventListener('scroll', () => requestAnimationFrame(mark), {passive: true})
  mark()
}

// The index is a script, not data to be fetched, so that search works from a folder, too.
function loadIndex() {
  loadIndex.done ??= new Promise(resolve => {
    document.head.append(Object.assign(document.createElement('script'), {src: 'search-index.js', onload: resolve}))
  })
  return loadIndex.done
}

function enableSearch(input, list) {
  const options = () => [...list.children].filter(li => li.role === 'option')
  const show = open => { list.hidden = !open; input.setAttribute('aria-expanded', open) }
  const select = number => {
    const all = options(), chosen = all.at(number % all.length)
    all.forEach(li => li.setAttribute('aria-selected', li === chosen))
    input.setAttribute('aria-activedescendant', chosen?.id ?? '')
    chosen?.scrollIntoView({block: 'nearest'})
  }
  const update = async () => {
    await loadIndex()
    const words = spelled(input.value.toLowerCase().match(/\S+/g) ?? [])
    list.replaceChildren(...words.length ? results(find(words), words) : [])
    show(words.length > 0)
    select(0)
  }
  input.oninput = input.onfocus = update
  input.onkeydown = event => {
    const selected = options().findIndex(li => li.ariaSelected === 'true')
    if (event.key === 'ArrowDown') select(selected + 1)
    else if (event.key === 'ArrowUp') select(selected - 1)
    else if (event.key === 'Enter') options()[selected]?.firstChild.click()
    else if (event.key === 'Escape') { show(false); input.blur() }
    else return
    event.preventDefault()
  }
  addEventListener('click', event => { if (!event.target.closest('search')) show(false) })
  list.onclick = () => show(false)
  addEventListener('keydown', event => {
    const typing = event.target.closest?.('input, textarea, [contenteditable]')
    if (event.key === '/' && !typing) { event.preventDefault(); input.focus() }
  })
}

// Sections that hold every word. First the page of that very name, then the section of that name, then the page with that keyword; then those that bear a word in their title: as the
// whole of it, as a word of its own, or within a word; then those that speak of it most.
function find(words) {
  const within = (text, word) => !text.includes(word) ? 0 : text === word ? 3 : text.split(/[^\p{L}\p{N}]+/u).includes(word) ? 2 : 1
  const score = s => words.reduce((sum, word) => {
    const [name, title, text] = [s.heading || s.title, s.title, s.text].map(part => part.toLowerCase())
    if (name === words.join(' ')) sum += s.heading ? 20 : 40
    const keyword = s.keywords.toLowerCase().split(', ').some(k => k === words.join(' ') || k === word)
    if (keyword) sum += 38
    const often = text.split(word).length - 1
    return title.includes(word) || name.includes(word) || often || keyword ? sum + 10 * within(name, word) + 2 * Math.log2(1 + often) : -Infinity
  }, 0)
  return searchIndex.map(s => [score(s), s]).filter(([n]) => n > -Infinity).sort((a, b) => b[0] - a[0]).slice(0, 12).map(([, s]) => s)
}

const GREEK = {α: 'alpha', β: 'beta', γ: 'gamma', δ: 'delta', ε: 'varepsilon', θ: 'theta', λ: 'lambda', μ: 'mu', ρ: 'rho', τ: 'tau', φ: 'varphi', ψ: 'psi'}

// Each word as the index spells it, Greek letters by their names in formulas: a word that is found nowhere becomes the most frequent one that differs by a letter.
function spelled(words) {
  const texts = searchIndex.map(s => `${s.title} ${s.heading} ${s.keywords} ${s.text}`.toLowerCase())
  return words.map(given => {
    const word = GREEK[given] ?? given
    if (word.length < 4 || texts.some(text => text.includes(word))) return word
    const counts = new Map()
    for (const text of texts) for (const known of text.match(/\p{L}{3,}/gu) ?? []) if (oneLetterApart(word, known)) counts.set(known, 1 + (counts.get(known) ?? 0))
    return [...counts].sort((a, b) => b[1] - a[1])[0]?.[0] ?? word
  })
}

// A letter more, less, other, or two that have changed places.
function oneLetterApart(a, b) {
  if (Math.abs(a.length - b.length) > 1) return false
  let i = 0, j = 0
  while (i < a.length && a[i] === b[i]) i++
  while (j < Math.min(a.length, b.length) - i && a.at(-1 - j) === b.at(-1 - j)) j++
  const [restA, restB] = [a.slice(i, a.length - j), b.slice(i, b.length - j)]
  return Math.max(restA.length, restB.length) === 1 || restA.length === 2 && restA === [...restB].reverse().join('')
}

function results(sections, words) {
  if (!sections.length) return [element('li', {className: 'none'}, 'Nothing found')]
  return sections.map((section, number) => {
    const where = element('span', {className: 'where'}, section.heading ? `${section.title} › ${section.heading}` : section.title)
    const link = element('a', {href: section.url, tabIndex: -1}, where, element('span', {className: 'snippet'}, ...snippet(section.text, words)))
    return element('li', {id: `result-${number}`, role: 'option'}, link)
  })
}

// The surroundings of the first word found, every word marked.
function snippet(text, words) {
  const at = Math.min(...words.map(word => text.toLowerCase().indexOf(word)).filter(i => i >= 0))
  const from = Number.isFinite(at) ? Math.max(0, text.lastIndexOf(' ', Math.max(0, at - 40))) : 0
  const pattern = new RegExp(`(${words.map(word => word.replace(/[^\w\s]/g, '\\$&')).join('|')})`, 'i')
  return [from ? '…' : '', ...text.slice(from, from + 150).split(pattern).map((part, i) => i % 2 ? element('mark', {}, part) : part), '…']
}

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties)
  made.append(...children)
  return made
}
