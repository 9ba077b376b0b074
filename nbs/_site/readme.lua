-- Addresses as seen from the top of the repository, and the plain markdown that every viewer shows.
local function from_top(address)
  if address:match('^%a+:') or address:match('^#') then return address end
  if address:match('^%.%./') then return address:sub(4) end
  return 'nbs/' .. address
end

function Link(link)
  link.target = from_top(link.target)
  return link
end

function Image(image)
  image.src = from_top(image.src)
  return image
end

function Figure(figure)
  local image = figure.content[1].content[1]
  local caption = pandoc.utils.blocks_to_inlines(figure.caption.long)
  image.caption = #image.caption > 0 and image.caption or caption
  return {pandoc.Para(image), pandoc.Para(pandoc.Emph(caption))}
end

function Div(div) return div.content end   -- the page's own: what is alive there is a picture here

function CodeBlock(block)
  local language = block.classes[1]
  return pandoc.CodeBlock(block.text, {class = (language and not language:match('^cell')) and language or ''})
end

function Pandoc(doc)
  doc.blocks:insert(1, pandoc.Header(1, doc.meta.title))
  doc.blocks:insert(2, pandoc.BlockQuote(pandoc.Para(doc.meta.description)))
  return doc
end
