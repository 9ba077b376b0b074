-- What the chapters use of Quarto's markdown and plain pandoc does not know:
-- callouts, numbered figures and equations, references to them; and tables that scroll in a box of their own.
local titles = {note = 'Note', tip = 'Tip', warning = 'Warning', important = 'Important', caution = 'Caution'}
local counts, labels = {Figure = 0, Equation = 0}, {}

local function number(kind, id)
  counts[kind] = counts[kind] + 1
  labels[id] = kind .. ' ' .. counts[kind]
  return labels[id]
end

local function callout(div)
  local kind = div.classes:find_if(function(class) return class:match('^callout%-') end)
  if not kind then return nil end
  local title = pandoc.Inlines(div.attributes.title or titles[kind:sub(9)])
  if div.content[1] and div.content[1].t == 'Header' then title = div.content:remove(1).content end
  local head = pandoc.Div(pandoc.Plain(title), {class = 'callout-title'})
  return pandoc.Div({head, table.unpack(div.content)}, {class = 'callout ' .. kind, role = 'note'})
end

local function figure(fig)
  if not fig.identifier:match('^fig%-') then return nil end
  local label = pandoc.Span(number('Figure', fig.identifier) .. '.', {class = 'figure-number'})
  local caption = fig.caption.long[1]
  if caption then caption.content = pandoc.List({label, pandoc.Space()}) .. caption.content end
  return fig
end

-- `$$ ... $$ {#eq-name}`
local function equation(inlines)
  for i = 3, #inlines do
    local id = inlines[i] and inlines[i].t == 'Str' and inlines[i].text:match('^{#(eq%-[%w-]+)}$')
    local maths = inlines[i - 2]
    if id and maths.t == 'Math' then
      maths.text = maths.text .. '\\tag{' .. number('Equation', id):match('%d+') .. '}'
      inlines[i - 2] = pandoc.Span(maths, {id = id})
      inlines:remove(i)
    end
  end
  return inlines
end

local function reference(cite)
  local id = cite.citations[1].id
  if labels[id] then return pandoc.Link(labels[id], '#' .. id) end
  if id:match('^fig%-') or id:match('^eq%-') or id:match('^tbl%-') or id:match('^sec%-') then
    error('unresolved reference @' .. id)
  end
end

-- A cell of numbers is broken before a bracket only: "3.0 [2.4, 3.6]", "51.3 ± 2.3", "0 of 20".
local function whole(cell)
  local text = pandoc.utils.stringify(cell.contents):gsub('of', '')
  if not text:match('%d') or text:match('%a') then return end
  cell.contents = cell.contents:walk{Inlines = function(inlines)
    for i, inline in ipairs(inlines) do
      local after = inlines[i + 1] and pandoc.utils.stringify(inlines[i + 1]) or ''
      if inline.t == 'Space' and not after:match('^[%[%(]') then inlines[i] = pandoc.Str('\u{a0}') end
    end
    return inlines
  end}
  return cell
end

local function scroll(tbl)
  for _, body in ipairs(tbl.bodies) do
    for _, row in ipairs(body.body) do
      for _, cell in ipairs(row.cells) do whole(cell) end
    end
  end
  return pandoc.Div(tbl, {class = 'table-scroll'})
end

return {{Div = callout, Table = scroll}, {Figure = figure, Inlines = equation}, {Cite = reference}}
